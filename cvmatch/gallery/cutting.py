"""Cells of a grid -> pictures of them, cut from windows of the imagery that many cells share."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from cvmatch.data import images
from cvmatch.gallery.grid import Cells, Grid, latitude_at, square_at
from cvmatch.gallery.imagery.sources import Source, open_source
from cvmatch.gallery.mercator import Window, choose_level
from cvmatch.gallery.resampling import Box, average, resample
from cvmatch.gallery.settings import Format, MakeGallery

WINDOW = 2048
"""Width of a window that cells share, in pixels of the imagery, at most and about: 16 MB."""

LARGEST = 16_384
"""Width of a window at most, in pixels: a single cell whose imagery has no coarser level."""

Picture = UInt8[np.ndarray, "size size 3"] | str
"""Of a cell, or why there is none."""


@dataclass(frozen=True)
class Cutter:
    """What cells to cut, and from what imagery."""

    imagery: str
    """Location."""
    format: Format
    """How it is stored; not auto."""
    grid: Grid
    """Where the cells lie."""
    size: int
    """Width and height of a picture, in pixels."""
    zoom: int | None
    """That is read; None: by the size of a pixel on the ground."""

    @classmethod
    def of(cls, config: MakeGallery, kind: Format, imagery: str) -> "Cutter":
        """Take the settings of the job."""
        grid = Grid(config.metres, config.overlap)
        return cls(imagery, kind, grid, config.size, config.zoom)

    @property
    def source(self) -> Source:
        """The imagery, opened once in a process."""
        return open_source(self.imagery, self.format)

    def levels_of(self, cells: Cells) -> Int[np.ndarray, " cell"]:
        """Return the number of the level that each cell is cut from: the same in all of its row."""
        rows, row_of = np.unique(cells.row, return_inverse=True)
        latitude, _ = self.grid.middles(Cells(rows, np.zeros_like(rows)))
        return self._level_at(latitude)[row_of]

    def _level_at(self, latitude: Float[np.ndarray, " place"]) -> Int[np.ndarray, " place"]:
        """Return the number of the level that is read at each latitude."""
        source = self.source
        if self.zoom is not None:
            return np.full(len(latitude), source.find_zoom(self.zoom))
        wanted = self.grid.metres / self.size / np.cos(np.radians(latitude))
        return np.array([choose_level(source.levels, one) for one in wanted], dtype=np.int64)

    def sort(self, cells: Cells) -> Cells:
        """Put cells that share a window next to each other."""
        keys = self._windows(cells)
        return cells.take(np.lexsort((cells.column, cells.row, *keys.T[::-1])))

    def measure_coverage(self, cells: Cells) -> Float[np.ndarray, " cell"]:
        """Return the share of each cell that the imagery shows, in [0, 1]."""
        shares = np.zeros(len(cells))
        for level, members, boxes in self._groups(cells):
            window = _window_of(boxes)
            known = self.source.read_known(level, window)
            for cell, box in zip(members.tolist(), boxes.tolist(), strict=True):
                part, inside = _slice(window, box)
                shares[cell] = average(known[part], inside)
        return shares

    def cut(self, cells: Cells) -> list[Picture]:
        """Return the picture of each cell, or why it cannot be read."""
        pictures: list[Picture] = [""] * len(cells)
        for level, members, boxes in self._groups(cells):
            cut = self._cut_window(level, boxes)
            for cell, picture in zip(members.tolist(), cut, strict=True):
                pictures[cell] = picture
        return pictures

    def cut_at(
        self, latitude: float, longitude: float
    ) -> tuple[UInt8[np.ndarray, "size size 3"], float]:
        """Return the picture of a square with its middle at a place, and the share that is shown.

        Raises:
            BadImage: the imagery cannot be read there.
        """
        level = self._level_at(np.array([latitude])).item()
        boxes = self.source.levels[level].locate(
            square_at(latitude, longitude, self.grid.metres)[None]
        )
        window = _window_of(boxes)
        part, inside = _slice(window, boxes[0].tolist())
        shown = average(self.source.read_known(level, window)[part], inside)
        return resample(self.source.read(level, window)[part], inside, self.size), shown

    def _cut_window(self, level: int, boxes: Float[np.ndarray, "cell 4"]) -> list[Picture]:
        """Cut cells from one window, or where it has a fault, each cell on its own."""
        window = _window_of(boxes)
        try:
            pixels = self.source.read(level, window)
        except images.BadImage as error:
            if len(boxes) == 1:
                return [str(error)]
            return [self._cut_window(level, one[None])[0] for one in boxes]
        parts = [_slice(window, box) for box in boxes.tolist()]
        return [resample(pixels[part], inside, self.size) for part, inside in parts]

    def _groups(
        self, cells: Cells
    ) -> Iterator[tuple[int, Int[np.ndarray, " member"], Float[np.ndarray, "member 4"]]]:
        """Yield level, numbers and boxes in pixels of the cells that share a window."""
        found, group_of = np.unique(self._windows(cells), axis=0, return_inverse=True)
        boxes = self.grid.boxes(cells)
        for group, (level, *_) in enumerate(found.tolist()):
            members = np.flatnonzero(group_of.reshape(-1) == group)
            yield level, members, self.source.levels[level].locate(boxes[members])

    def _windows(self, cells: Cells) -> Int[np.ndarray, "cell 4"]:
        """Return level, cells across, row and column of the window that each cell is cut from."""
        levels = self.levels_of(cells)
        latitude, longitude = self.grid.middles(cells)
        resolution = np.array([one.x_resolution for one in self.source.levels])[levels]
        stride = self.grid.stride / np.cos(np.radians(latitude)) / resolution
        across = 2 ** np.log2(np.maximum(1, WINDOW / stride)).astype(np.int64)
        row = cells.row // across
        # Rows have different numbers of columns: a window has those of its southern row.
        columns = self.grid.count_columns(latitude_at(row * across * self.grid.stride))
        column = np.floor(longitude / 360 * columns / across).astype(np.int64)
        return np.stack([levels, across, row, column], axis=1)


def _window_of(boxes: Float[np.ndarray, "cell 4"]) -> Window:
    """Return the pixels that boxes are resampled from: one more on each side."""
    left, top = np.floor(boxes[:, :2].min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(boxes[:, 2:].max(axis=0)).astype(int) + 1
    width, height = int(right - left), int(bottom - top)
    if max(width, height) > LARGEST:
        raise ValueError(
            f"gallery: expected imagery with at most {LARGEST} pixels across a cell, got {width}: "
            "it is much finer than the cells' pictures, and has no coarser levels. Add these "
            "(`gdaladdo -r average FILE`, or lower zooms), or raise --size."
        )
    return Window(int(left), int(top), width, height)


def _slice(window: Window, box: list[float]) -> tuple[tuple[slice, slice], Box]:
    """Return a box's part of a window's pixels, and where in that part it lies.

    A part that depends on the box alone, so that a cell is the same in every window.
    """
    own = _window_of(np.array([box]))
    rows = slice(own.top - window.top, own.top - window.top + own.height)
    columns = slice(own.left - window.left, own.left - window.left + own.width)
    left, top, right, bottom = box
    return (rows, columns), (left - own.left, top - own.top, right - own.left, bottom - own.top)
