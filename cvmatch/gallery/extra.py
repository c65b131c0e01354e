"""What is installed only by `pip install cvmatch[geo]`."""

import importlib

LIBRARIES = ("rasterio", "pmtiles", "shapely")


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
