"""Imagery -> a gallery: square cells of the ground, as rows that an index is built of.

`grid` says where the cells lie, `imagery` opens what there is, `cutting` reads it by window and
cuts the cells, `run` does so on Ray; `pairs` cuts tiles at the places of photos, to learn from.
"""

import importlib

LIBRARIES = ("rasterio", "pmtiles", "shapely")
"""What only `pip install cvmatch[geo]` installs."""


def require_geo() -> None:
    """Check that the libraries for imagery are installed.

    Raises:
        RuntimeError: one is not; says what to install.
    """
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RuntimeError(
                f"gallery: expected the library {name}, got {error}. Install what reads imagery: "
                "`pip install cvmatch[geo]`."
            ) from error
