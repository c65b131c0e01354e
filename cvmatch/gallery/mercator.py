"""Levels of imagery in Web Mercator (EPSG:3857), and where a cell lies among their pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cvmatch.gallery.grid import MAX_LATITUDE, SEMI_MAJOR_M

HALF_M = math.pi * SEMI_MAJOR_M
"""Half the width of the world in Web Mercator, in its metres."""

SNAP = 256
"""A cell's edges are rounded to 1 / SNAP of a pixel, so that one mosaic, stored in two ways whose
coordinates differ in their last bits, gives the same pictures."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a level's pixels."""

    left: int
    """Column of its first pixel."""
    top: int
    """Row of its first pixel."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


@dataclass(frozen=True)
class Level:
    """A grid of pixels in Web Mercator, north up."""

    name: str
    """Such as `zoom 19`."""
    west: float
    """Of the left edge of column 0, in metres of Web Mercator."""
    north: float
    """Of the upper edge of row 0."""
    x_resolution: float
    """Width of a pixel, in metres of Web Mercator: those of the ground at the equator."""
    y_resolution: float
    """Height of a pixel."""

    def locate(self, boxes: Float[np.ndarray, "cell 4"]) -> Float[np.ndarray, "cell 4"]:
        """Return left, top, right and bottom in pixels of boxes of degrees (`Grid.boxes`).

        Edges, not middles: pixel 0 reaches from 0 to 1.
        """
        west, south, east, north = boxes.T
        edges = [
            (project_longitude(west) - self.west) / self.x_resolution,
            (self.north - project_latitude(north)) / self.y_resolution,
            (project_longitude(east) - self.west) / self.x_resolution,
            (self.north - project_latitude(south)) / self.y_resolution,
        ]
        return np.rint(np.stack(edges, axis=1) * SNAP) / SNAP


def zoom_level(zoom: int, tile: int) -> Level:
    """Return the level of a zoom whose map tiles are `tile` pixels wide."""
    resolution = 2 * HALF_M / (tile * 2**zoom)
    return Level(f"zoom {zoom}", -HALF_M, HALF_M, resolution, resolution)


def choose_level(levels: Sequence[Level], resolution: float) -> int:
    """Return the number of the coarsest level at least as fine as `resolution`, or of the finest.

    Args:
        levels: any.
        resolution: metres of Web Mercator a pixel.
    """
    fine = [n for n, one in enumerate(levels) if one.x_resolution <= resolution * (1 + 1e-6)]
    if fine:
        return max(fine, key=lambda n: levels[n].x_resolution)
    return min(range(len(levels)), key=lambda n: levels[n].x_resolution)


def project_longitude(longitude: Float[np.ndarray, "*cell"]) -> Float[np.ndarray, "*cell"]:
    """Return metres to the east of Greenwich."""
    return longitude * (HALF_M / 180)


def project_latitude(latitude: Float[np.ndarray, "*cell"]) -> Float[np.ndarray, "*cell"]:
    """Return metres to the north of the equator; latitudes are clipped to the world's square."""
    phi = np.radians(np.clip(latitude, -MAX_LATITUDE, MAX_LATITUDE))
    return SEMI_MAJOR_M * np.arcsinh(np.tan(phi))


def tile_bounds(zoom: int, left: int, top: int, right: int, bottom: int) -> tuple[float, ...]:
    """Return west, south, east and north in degrees of tiles `left` to `right` (without it)."""
    count = 2**zoom

    def latitude(row: int) -> float:
        return math.degrees(math.atan(math.sinh(math.pi * (1 - 2 * row / count))))

    return left / count * 360 - 180, latitude(bottom), right / count * 360 - 180, latitude(top)
