"""A global grid of square cells: rows of equal meridian arc, each divided into columns.

All formulas are of the ellipsoid WGS84 (Snyder 1987, Map Projections, equations 3-21, 3-24, 3-26
and 4-21), since a sphere is wrong by up to 0.7 %.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Bounds = tuple[float, float, float, float]
"""West, south, east and north, in degrees."""

SEMI_MAJOR_M = 6_378_137.0
"""Equatorial radius, in metres."""

MAX_LATITUDE = math.degrees(math.atan(math.sinh(math.pi)))
"""Where the square of Web Mercator ends, in degrees: 85.05."""

MAX_CELLS = 500_000_000
"""Cells at most of one gallery; they are listed in the driver's memory."""

_F = 1 / 298.257223563
_E2 = _F * (2 - _F)
_N = _F / (2 - _F)
_ARC_M = SEMI_MAJOR_M * (1 - _E2 / 4 - 3 * _E2**2 / 64 - 5 * _E2**3 / 256)
"""Meridian arc of a radian of rectifying latitude, in metres."""


def meridian_arc(latitude: Float[np.ndarray, "*cell"]) -> Float[np.ndarray, "*cell"]:
    """Return metres along the meridian from the equator to a latitude in degrees; to 1 mm."""
    phi = np.radians(latitude)
    return SEMI_MAJOR_M * (
        (1 - _E2 / 4 - 3 * _E2**2 / 64 - 5 * _E2**3 / 256) * phi
        - (3 * _E2 / 8 + 3 * _E2**2 / 32 + 45 * _E2**3 / 1024) * np.sin(2 * phi)
        + (15 * _E2**2 / 256 + 45 * _E2**3 / 1024) * np.sin(4 * phi)
        - (35 * _E2**3 / 3072) * np.sin(6 * phi)
    )


def latitude_at(arc: Float[np.ndarray, "*cell"]) -> Float[np.ndarray, "*cell"]:
    """Return the latitude in degrees at metres along the meridian; the inverse, to 1 mm."""
    mu = arc / _ARC_M
    return np.degrees(
        mu
        + (3 * _N / 2 - 27 * _N**3 / 32) * np.sin(2 * mu)
        + (21 * _N**2 / 16 - 55 * _N**4 / 32) * np.sin(4 * mu)
        + (151 * _N**3 / 96) * np.sin(6 * mu)
        + (1097 * _N**4 / 512) * np.sin(8 * mu)
    )


def parallel_radius(latitude: Float[np.ndarray, "*cell"]) -> Float[np.ndarray, "*cell"]:
    """Return the radius of a parallel in metres."""
    phi = np.radians(latitude)
    return SEMI_MAJOR_M * np.cos(phi) / np.sqrt(1 - _E2 * np.sin(phi) ** 2)


def square_at(latitude: float, longitude: float, metres: float) -> Float[np.ndarray, "4"]:
    """Return west, south, east and north, in degrees, of a square of the ground by its middle."""
    middle = np.array([latitude])
    arc = meridian_arc(middle)
    wide = np.degrees(metres / 2 / parallel_radius(middle))
    edges = [longitude - wide, latitude_at(arc - metres / 2), longitude + wide]
    return np.concatenate([*edges, latitude_at(arc + metres / 2)])


@dataclass(frozen=True, eq=False)
class Cells:
    """Some cells of a grid."""

    row: Int[np.ndarray, " cell"]
    """Counted to the north from the equator, whose row is 0."""
    column: Int[np.ndarray, " cell"]
    """Counted to the east from Greenwich, whose column is 0."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: Int[np.ndarray, " some"] | Bool[np.ndarray, " cell"]) -> "Cells":
        """Return some of them, by number or by mask."""
        return Cells(self.row[which], self.column[which])


@dataclass(frozen=True)
class Grid:
    """Square cells of the ground, the same ones whatever part of the earth is asked for.

    The middles of rows are `stride` apart on the meridian, and a row has the whole number of
    columns that comes nearest to `stride` on its middle parallel: up to stride / (2 x its length)
    off, which is 1e-5 at most below 85 degrees for a stride below 70 m. A cell is a rectangle of
    latitude and longitude, `metres` high on the meridian (to 1 mm) and `metres` wide on its
    middle parallel. On its northern and southern edge its width, and so the ground that a pixel
    shows, is off by tan(latitude) x metres / 2 / 6,371 km: 1.3e-5 for 60 m at 70 degrees.
    """

    metres: float
    """Width and height of a cell."""
    overlap: float
    """Share of a cell, in [0, 1), that the next one covers too."""

    @property
    def stride(self) -> float:
        """Metres from a cell's middle to the next one's."""
        return self.metres * (1 - self.overlap)

    def ids(self, cells: Cells) -> list[str]:
        """Name the cells: by their size, their overlap and their place in the grid."""
        kind = f"{self.metres:.12g}m-{self.overlap:.12g}"
        return [
            f"{kind}-{'NS'[row < 0]}{abs(row)}-{'EW'[column < 0]}{abs(column)}"
            for row, column in zip(cells.row.tolist(), cells.column.tolist(), strict=True)
        ]

    def middles(
        self, cells: Cells
    ) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
        """Return latitude and longitude of their middles, in degrees."""
        latitude = latitude_at(cells.row * self.stride)
        return latitude, cells.column * 360 / self.count_columns(latitude)

    def boxes(self, cells: Cells) -> Float[np.ndarray, "cell 4"]:
        """Return west, south, east and north of each, in degrees; beyond 180 at the date line."""
        latitude, longitude = self.middles(cells)
        wide = np.degrees(self.metres / 2 / parallel_radius(latitude))
        south = latitude_at(cells.row * self.stride - self.metres / 2)
        north = latitude_at(cells.row * self.stride + self.metres / 2)
        return np.stack([longitude - wide, south, longitude + wide, north], axis=1)

    def count_columns(self, latitude: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
        """Return how many columns the row at a latitude has, a whole number."""
        return np.maximum(1, np.rint(2 * np.pi * parallel_radius(latitude) / self.stride))

    def cell_at(self, latitude: float, longitude: float) -> Cells:
        """Return the cell whose middle is nearest to a place, along its row and its column."""
        row = np.rint(meridian_arc(np.array([latitude])) / self.stride).astype(np.int64)
        columns = self.count_columns(latitude_at(row * self.stride))
        first = -(columns.astype(np.int64) // 2)
        column = np.rint(longitude / 360 * columns).astype(np.int64)
        return Cells(row, (column - first) % columns.astype(np.int64) + first)  # 180 E is 180 W

    def within(self, bounds: Bounds) -> Cells:
        """Return the cells whose middles lie in a box, row by row.

        Raises:
            ValueError: they may be more than MAX_CELLS.
        """
        west, south, east, north = bounds
        limits = np.clip(np.array([south, north]), -MAX_LATITUDE, MAX_LATITUDE)
        first, last = (meridian_arc(limits) / self.stride).tolist()
        self._check_count((last - first) * (east - west) / 360, bounds)
        rows = np.arange(math.ceil(first), math.floor(last) + 1)
        columns = self.count_columns(latitude_at(rows * self.stride))
        left = np.ceil(np.maximum(west / 360, -0.5) * columns).astype(np.int64)
        right = np.floor(np.minimum(east / 360 * columns, (columns - 1) / 2)).astype(np.int64)
        counts = np.maximum(right - left + 1, 0)
        begins = np.repeat(np.cumsum(counts) - counts - left, counts)
        return Cells(np.repeat(rows, counts), np.arange(counts.sum()) - begins)

    def _check_count(self, turns: float, bounds: Bounds) -> None:
        """Refuse more cells than MAX_CELLS, were all rows (`turns` round the earth) the widest."""
        widest = np.clip(0, bounds[1], bounds[3])  # the latitude next to the equator
        count = turns * self.count_columns(np.array([widest], dtype=np.float64))[0]
        if count > MAX_CELLS:
            raise ValueError(
                f"gallery: expected at most {MAX_CELLS:,} cells, got up to {count:,.0f} of "
                f"{self.metres:g} m within {format_bounds(bounds)}. Pass a smaller --region, "
                "larger --metres or less --overlap."
            )


def format_bounds(bounds: Bounds) -> str:
    """Write them for a person."""
    return "longitude {0:.4f} to {2:.4f}, latitude {1:.4f} to {3:.4f}".format(*bounds)
