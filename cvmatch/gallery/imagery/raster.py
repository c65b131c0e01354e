"""GeoTIFF, COG or VRT as a picture in Web Mercator, of which windows are read."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import rasterio
from jaxtyping import UInt8
from rasterio import warp
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT

from cvmatch.data import images, storage
from cvmatch.gallery.grid import Bounds
from cvmatch.gallery.imagery.stores import file_fingerprint
from cvmatch.gallery.mercator import HALF_M, Level, Window, choose_level

WEB_MERCATOR = CRS.from_epsg(3857)

_COLOURS = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


class Raster:
    """A file that GDAL opens, with its overviews.

    The bands that are marked red, green and blue are read, else the first three, or one as grey.
    Known is what its mask, its alpha band or its nodata value says. One that is not in Web Mercator
    is warped to it, bilinearly, at its own resolution.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.path = _find(location)
        with _named(location):
            full = _open(self.path)
            self._check(full)
            count = len(full.overviews(1))
            levels = [full, *(_open(self.path, overview_level=n) for n in range(count))]
            self._bounds = full.bounds, full.crs
            self._files = full.files
            self._bands = _choose_bands(full)
            self._levels = [_in_mercator(one) for one in levels]
        names = ["full resolution", *(f"overview {n}" for n in range(1, count + 1))]
        self.levels = tuple(map(_describe, names, self._levels))

    def find_bounds(self) -> Bounds:
        """Return west, south, east and north of the file, in degrees."""
        box, crs = self._bounds
        west, south, east, north = warp.transform_bounds(crs, CRS.from_epsg(4326), *box)
        return west, south, east, north

    def fingerprint(self) -> str:
        """Hash the sizes of the file and of those that it names."""
        return file_fingerprint(*sorted(self._files))

    def find_zoom(self, zoom: int) -> int:
        """Return the number of the coarsest level that is as fine as a zoom of 256-pixel tiles."""
        return choose_level(self.levels, 2 * HALF_M / (256 * 2**zoom))

    def read(self, level: int, window: Window) -> UInt8[np.ndarray, "h w 4"]:
        """Return the window's pixels: red, green, blue and how much of each is known.

        Raises:
            images.BadImage: GDAL cannot read it.
        """
        pixels = np.zeros((window.height, window.width, 4), dtype=np.uint8)
        dataset = self._levels[level]
        part, rows, columns = _clip(window, dataset.width, dataset.height)
        if part is not None:
            with _unreadable(self.location):
                bands = dataset.read(self._bands, window=part)
                pixels[rows, columns, :3] = bands.transpose(1, 2, 0)  # one band: three times
                pixels[rows, columns, 3] = dataset.dataset_mask(window=part)
        return pixels

    def read_known(self, level: int, window: Window) -> UInt8[np.ndarray, "h w"]:
        """Return how much of each pixel is known; where the file has no mask, without reading it.

        What cannot be read counts as known: it fails when it is read.
        """
        known = np.zeros((window.height, window.width), dtype=np.uint8)
        dataset = self._levels[level]
        part, rows, columns = _clip(window, dataset.width, dataset.height)
        if part is not None:
            known[rows, columns] = 255
            if not all(MaskFlags.all_valid in flags for flags in dataset.mask_flag_enums):
                with suppress(RasterioError):
                    known[rows, columns] = dataset.dataset_mask(window=part)
        return known

    def _check(self, dataset: Any) -> None:
        if dataset.crs is None or dataset.transform.is_identity:
            raise ValueError(
                f"{self.location}: expected a projection and the place of its corner, got a "
                "picture without. Add them: `gdal_edit.py -a_srs EPSG:... -a_ullr ...`, or a world "
                "file beside it."
            )
        kinds = set(dataset.dtypes)
        if kinds != {"uint8"}:
            raise ValueError(
                f"{self.location}: expected bands of 8 bits (uint8), got {sorted(kinds)}: how to "
                "map these to colours is yours to say. Scale them: `gdal_translate -ot Byte -scale "
                "MIN MAX 0 255 -of COG ...`."
            )
        if ColorInterp.palette in dataset.colorinterp:
            raise ValueError(
                f"{self.location}: expected colours, got a palette. Expand it: `gdal_translate "
                "-expand rgb ...`."
            )


def _find(location: str) -> str:
    if storage.is_remote(location) and location.lower().endswith(".vrt"):
        raise ValueError(
            f"{location}: expected a VRT on disk, got one in an object store: the files that it "
            "names would not be copied with it. Mount them on all nodes, or make a COG of it: "
            "`gdal_translate -of COG ...`."
        )
    return storage.local_file(location)


def _open(path: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # `Raster._check` says it
        return rasterio.open(path, **options)


def _choose_bands(dataset: Any) -> list[int]:
    marked = {kind: band for band, kind in enumerate(dataset.colorinterp, 1)}
    if all(colour in marked for colour in _COLOURS):
        return [marked[colour] for colour in _COLOURS]
    colours = [n for n, kind in enumerate(dataset.colorinterp, 1) if kind != ColorInterp.alpha]
    return colours[:3] if len(colours) >= 3 else colours[:1] * 3


def _in_mercator(dataset: Any) -> Any:
    """Return a dataset as it is if it is in Web Mercator and north up, else warped to that."""
    shape = dataset.transform
    upright = shape.b == shape.d == 0 and shape.a > 0 > shape.e
    if dataset.crs == WEB_MERCATOR and upright:
        return dataset
    alpha = ColorInterp.alpha in dataset.colorinterp
    return WarpedVRT(dataset, crs=WEB_MERCATOR, resampling=Resampling.bilinear, add_alpha=not alpha)


def _describe(name: str, dataset: Any) -> Level:
    shape = dataset.transform
    return Level(name, shape.c, shape.f, shape.a, -shape.e)


def _clip(window: Window, width: int, height: int) -> tuple[Any, slice, slice]:
    """Return the rows and columns of a window that the file has, and where in it they lie."""
    left, top = max(0, window.left), max(0, window.top)
    right = min(width, window.left + window.width)
    bottom = min(height, window.top + window.height)
    rows = slice(top - window.top, bottom - window.top)
    columns = slice(left - window.left, right - window.left)
    if left >= right or top >= bottom:
        return None, rows, columns
    return ((top, bottom), (left, right)), rows, columns


@contextmanager
def _named(location: str) -> Iterator[None]:
    try:
        yield
    except RasterioError as error:
        raise ValueError(
            f"{location}: expected a raster that GDAL opens (GeoTIFF, COG, VRT), got {error}. Copy "
            "it again, or convert it: `gdal_translate -of COG ...`."
        ) from error


@contextmanager
def _unreadable(location: str) -> Iterator[None]:
    try:
        yield
    except RasterioError as error:
        raise images.BadImage(f"{location}: cannot be read: {error}") from error
