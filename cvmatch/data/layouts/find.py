"""Recognise the layout of a directory, or of one a little below it."""

from cvmatch.data import storage
from cvmatch.data.images import is_picture
from cvmatch.data.layouts import cvact, cvusa, own_pairs
from cvmatch.data.layouts.rows import Layout

_SEARCHED = 2  # levels below the given root: an archive unpacks to CVUSA_subset/CVUSA_subset
_PICTURES = (
    "anu_data_small",
    "anu_data_test",
    "bingmap",
    "polarmap",
    "segmap",
    "sky_mask",
    "streetview",
)  # big; not searched

_TILES_ALONE = (
    " Pictures of tiles alone come into an index as Parquet rows of pair_id and aerial (the bytes "
    "of a PNG or JPEG): cvmatch build-index --rows DIRECTORY."
)


def find(root: str) -> Layout:
    """Find the data set at `root`, or in the only directory at most two levels below.

    Raises:
        ValueError: there is none, or more than one.
    """
    level = [storage.absolute(root).rstrip("/")]
    for depth in range(_SEARCHED + 1):
        layouts = [layout for folder in level if (layout := _find_at(folder))]
        if len(layouts) > 1:
            raise ValueError(
                f"{root}: expected one data set, got {[one.root for one in layouts]}. "
                "Pass the one you mean as the root (this job's flag that ends in .root)."
            )
        if layouts:
            return layouts[0]
        if depth < _SEARCHED:
            level = [below for folder in level for below in _directories(folder)]
    names = storage.names(root)
    alone = any(map(is_picture, names))
    raise ValueError(
        f"{root}: expected train-19zl.csv or val-19zl.csv (CVUSA subset), or the same in splits/ "
        "(CVUSA), ACT_data.mat (CVACT), or train.csv or val.csv with the columns "
        f"{' and '.join(own_pairs.NEEDED)} (own pairs), there or at most {_SEARCHED} levels below; "
        f"got {names[:12]}. "
        "Pass the directory that holds them as the root (this job's flag that ends in .root)."
        f"{_TILES_ALONE if alone else ''}"
    )


def _find_at(root: str) -> Layout | None:
    return cvusa.find_at(root) or cvact.find_at(root) or own_pairs.find_at(root)


def _directories(location: str) -> list[str]:
    """List directories that may hold a data set: not hidden ones, macOS's, or those of pictures."""
    return [
        storage.inside(location, name)
        for name in storage.names(location, directories=True)
        if not name.startswith((".", "__MACOSX")) and name.lower() not in _PICTURES
    ]
