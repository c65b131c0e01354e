"""Open imagery, whatever it is stored as."""

import functools
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from cvmatch.data import storage
from cvmatch.gallery.grid import Bounds
from cvmatch.gallery.imagery.raster import Raster
from cvmatch.gallery.imagery.stores import MBTiles, PMTiles, TileFolder
from cvmatch.gallery.imagery.tiles import MapTiles, compare_row_orders
from cvmatch.gallery.mercator import Level, Window
from cvmatch.gallery.settings import Format

_BY_ENDING: dict[str, Format] = {"mbtiles": "mbtiles", "pmtiles": "pmtiles"}


@runtime_checkable
class Source(Protocol):
    """Imagery in Web Mercator, of which windows are read."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Its zoom levels, or full resolution and overviews."""
        ...

    def find_bounds(self) -> Bounds:
        """Return west, south, east and north of all of it, in degrees."""
        ...

    def fingerprint(self) -> str:
        """Hash what its pixels depend on."""
        ...

    def find_zoom(self, zoom: int) -> int:
        """Return the number of the level that `--zoom` means."""
        ...

    def read(self, level: int, window: Window) -> UInt8[np.ndarray, "h w 4"]:
        """Return the window's pixels: red, green, blue and how much of each is known."""
        ...

    def read_known(self, level: int, window: Window) -> UInt8[np.ndarray, "h w"]:
        """Return how much of each pixel is known, cheaper than `read` where that is possible."""
        ...


@functools.lru_cache(8)
def open_source(location: str, kind: Format) -> Source:
    """Open imagery; once in a process.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what it should be.
    """
    if kind in ("xyz", "tms"):
        return MapTiles(TileFolder(location, from_south=kind == "tms"), location)
    if kind == "mbtiles":
        return MapTiles(MBTiles(location), location)
    if kind == "pmtiles":
        return MapTiles(PMTiles(location), location)
    return Raster(location)


def detect_format(location: str) -> Format:
    """Say how imagery is stored: a folder holds map tiles, a file is what its name ends in.

    A folder in which gdal2tiles left its description is TMS. Of any other one, rows that clearly
    fit together only when they are counted from the south are refused.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder's rows count from the south.
    """
    if not storage.exists(location):
        raise FileNotFoundError(
            f"{location}: expected imagery (a folder of map tiles, MBTiles, PMTiles, GeoTIFF), "
            "found nothing. Pass another --imagery."
        )
    if not storage.is_directory(location):
        return _BY_ENDING.get(location.rpartition(".")[2].lower(), "raster")
    if storage.exists(storage.join(location, "tilemapresource.xml")):
        return "tms"
    _check_row_order(location)
    return "xyz"


def _check_row_order(location: str) -> None:
    orders = compare_row_orders(TileFolder(location, from_south=False))
    if orders and orders[1] < orders[0] / 2:
        raise ValueError(
            f"{location}: expected rows that count from the north (XYZ), got tiles whose edges "
            "fit when rows count from the south (TMS): across seams, pixels then differ by "
            f"{orders[1]:.1f} levels instead of {orders[0]:.1f}. Pass --format tms, or "
            "--format xyz if they are XYZ nevertheless."
        )
