"""Map tiles as one picture for each zoom level, of which windows are read."""

import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from cvmatch.data import images
from cvmatch.gallery.grid import Bounds
from cvmatch.gallery.imagery.stores import TileStore
from cvmatch.gallery.mercator import Level, Window, zoom_level

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats of map tiles that are decoded."""

MODES = ("RGB", "RGBA", "L", "LA", "P")
"""Pillow's modes of 8 bits, which turn into RGBA without loss."""

SEAMS = 32
"""Tiles at most whose edges say whether rows count from the north or from the south."""


class MapTiles:
    """Tiles of a `TileStore`; one that is not there is unknown ground."""

    def __init__(self, store: TileStore, location: str) -> None:
        self.store, self.location = store, location
        self._size = self._measure()
        self.levels: tuple[Level, ...] = tuple(zoom_level(z, self._size) for z in store.zooms)

    def find_bounds(self) -> Bounds:
        """Return west, south, east and north of the tiles of the finest level, in degrees."""
        return self.store.find_bounds()

    def fingerprint(self) -> str:
        """Hash names and sizes."""
        return self.store.fingerprint()

    def find_zoom(self, zoom: int) -> int:
        """Return the number of the level of a zoom.

        Raises:
            ValueError: there is none.
        """
        if zoom not in self.store.zooms:
            have = list(self.store.zooms)
            raise ValueError(f"{self.location}: expected --zoom among {have}, got {zoom}.")
        return list(self.store.zooms).index(zoom)

    def read(self, level: int, window: Window) -> UInt8[np.ndarray, "h w 4"]:
        """Return the window's pixels: red, green, blue and how much of each is known.

        Raises:
            images.BadImage: a tile cannot be decoded; names it.
        """
        pixels = np.zeros((window.height, window.width, 4), dtype=np.uint8)
        for column, row in self._tiles(level, window):
            data = self._fetch(level, column, row)
            if data is not None:
                tile = self._decode(data, level, column, row)
                _paste(
                    tile, pixels, column * self._size - window.left, row * self._size - window.top
                )
        return pixels

    def read_known(self, level: int, window: Window) -> UInt8[np.ndarray, "h w"]:
        """Return how much of each pixel is known; tiles without transparency are not decoded.

        One that cannot be decoded counts as known: it fails when it is read.
        """
        known = np.zeros((window.height, window.width), dtype=np.uint8)
        whole = np.full((self._size, self._size), 255, dtype=np.uint8)
        for column, row in self._tiles(level, window):
            data = self._fetch(level, column, row)
            if data is not None:
                try:
                    tile = (
                        self._decode(data, level, column, row)[..., 3] if _may_lack(data) else whole
                    )
                except images.BadImage:
                    tile = whole
                _paste(
                    tile, known, column * self._size - window.left, row * self._size - window.top
                )
        return known

    def _measure(self) -> int:
        """Return the width of a tile in pixels."""
        zoom = self.store.zooms[-1]
        for column, row in self.store.sample(zoom, 8):
            tile = _try_tile(self.store, zoom, column, row)
            if tile is not None:
                return tile.shape[1]
        raise ValueError(
            f"{self.location}: expected map tiles (PNG, JPEG or WebP of 8 bits) at zoom {zoom}, "
            "found none that can be decoded."
        )

    def _tiles(self, level: int, window: Window) -> Iterator[tuple[int, int]]:
        """Column and row of the tiles that a window touches; none beyond the edge of the world."""
        count, size = 2 ** self.store.zooms[level], self._size
        for column in range(
            max(0, window.left // size), min(count, -(-(window.left + window.width) // size))
        ):
            for row in range(
                max(0, window.top // size), min(count, -(-(window.top + window.height) // size))
            ):
                yield column, row

    def _fetch(self, level: int, column: int, row: int) -> bytes | None:
        return self.store.tile(self.store.zooms[level], column, row)

    def _decode(
        self, data: bytes, level: int, column: int, row: int
    ) -> UInt8[np.ndarray, "size size 4"]:
        where = f"{self.location}: tile {self.store.zooms[level]}/{column}/{row} (as in XYZ)"
        try:
            tile = decode_tile(data)
        except images.BadImage as error:
            raise images.BadImage(f"{where}: {error}") from error
        if tile.shape[:2] != (self._size, self._size):
            raise images.BadImage(
                f"{where}: expected {self._size} x {self._size} pixels as of the others, got "
                f"{tile.shape[1]} x {tile.shape[0]}"
            )
        return tile


def decode_tile(data: bytes) -> UInt8[np.ndarray, "h w 4"]:
    """Decode a map tile: red, green, blue and opacity.

    Raises:
        images.BadImage: empty, cut short, no picture, or of more than 8 bits.
    """
    image = _open(data)
    try:
        return np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError) as error:
        raise images.BadImage(f"cannot be decoded: {error}") from error


def compare_row_orders(store: TileStore) -> tuple[float, float] | None:
    """Return how badly edges fit if rows count from the north, and if they count from the south.

    A mean difference of the pixels on both sides of seams, in levels of 255; None where no tile has
    one below it. Imagery goes on across a seam only where the tiles lie as they should.
    """
    zoom = store.zooms[-1]
    fits = []
    for column, row in store.sample(zoom, SEAMS):
        upper, lower = (_try_tile(store, zoom, column, at) for at in (row, row + 1))
        if upper is not None and lower is not None and upper.shape == lower.shape:
            fits.append((_differ(upper[-1], lower[0]), _differ(lower[-1], upper[0])))
    if not fits:
        return None
    north, south = np.mean(fits, axis=0).tolist()
    return north, south


def _try_tile(
    store: TileStore, zoom: int, column: int, row: int
) -> UInt8[np.ndarray, "h w 4"] | None:
    """Return a tile; None where there is none, or it cannot be decoded."""
    data = store.tile(zoom, column, row)
    try:
        return decode_tile(data) if data is not None else None
    except images.BadImage:
        return None


def _differ(first: UInt8[np.ndarray, "w 4"], second: UInt8[np.ndarray, "w 4"]) -> float:
    return float(np.abs(first.astype(np.int16) - second).mean())


def _open(data: bytes) -> Image.Image:
    if not data:
        raise images.BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise images.BadImage("no PNG, JPEG or WebP picture") from None
    if image.width * image.height > images.MAX_PIXELS or image.mode not in MODES:
        raise images.BadImage(
            f"expected at most {images.MAX_PIXELS} pixels of 8 bits, got {image.width} x "
            f"{image.height} of mode {image.mode}"
        )
    return image


def _may_lack(data: bytes) -> bool:
    """Whether a tile may have transparent pixels, by its header."""
    image = _open(data)
    return image.mode in ("RGBA", "LA", "P") or "transparency" in image.info


def _paste(tile: np.ndarray, onto: np.ndarray, left: int, top: int) -> None:
    """Put a tile where its corner belongs; what lies beyond the picture is left out."""
    height, width = onto.shape[:2]
    rows = slice(max(0, top), min(height, top + tile.shape[0]))
    columns = slice(max(0, left), min(width, left + tile.shape[1]))
    onto[rows, columns] = tile[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
