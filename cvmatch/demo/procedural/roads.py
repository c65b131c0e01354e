"""Roads of a world: curves given analytically, and their distance field in bands around them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int16

from cvmatch.demo.procedural.paints import Paint

CELLS = 1024
"""Cells along a side of a world."""
CELL = 0.5
"""Side of a cell, in metres."""
SPAN = CELLS * CELL
"""Side of a world, in metres."""
REACH = 6.0
"""Width of the band beside the asphalt in which distances are known, in metres."""

Points = Float[np.ndarray, "point 2"]


@dataclass(frozen=True, kw_only=True)
class Road:
    """A road of constant width. Coordinates are metres east and south of the north-west corner."""

    points: Points
    """Vertices of the centre line, at most 12 m apart."""
    half: float
    """Half the width of the carriageway, in metres."""
    paved: bool
    """Asphalt, or a dirt track."""
    walk: float
    """Width of the side-walks, in metres; 0 for none."""
    centre: Paint
    """Colour of the middle line; ASPHALT for none."""
    dashed: bool
    """Whether the middle line is dashed."""

    def stations(
        self, step: float, start: float = 0.0
    ) -> tuple[Points, Float[np.ndarray, "point 2"]]:
        """Positions every `step` metres along the road, and unit vectors along it there."""
        delta = np.diff(self.points, axis=0)
        length = np.hypot(*delta.T)
        total = np.concatenate([[0.0], np.cumsum(length)])
        at = np.arange(start, total[-1], step)
        piece = np.clip(np.searchsorted(total, at, side="right") - 1, 0, len(delta) - 1)
        along = delta[piece] / length[piece, None]
        return self.points[piece] + along * (at - total[piece])[:, None], along


@dataclass(frozen=True, kw_only=True)
class RoadField:
    """Per cell, its nearest road. Only known within REACH of a road; `edge` is 99 elsewhere."""

    edge: Float[np.ndarray, "south east"]
    """Distance from the nearest carriageway's edge, in metres; negative on it."""
    other: Float[np.ndarray, "south east"]
    """The same for the second nearest road (crossings)."""
    across: Float[np.ndarray, "south east"]
    """Signed distance from the middle line, in metres."""
    along: Float[np.ndarray, "south east"]
    """Distance along the road, in metres."""
    road: Int16[np.ndarray, "south east"]
    """Index of the road; -1 elsewhere."""


def lay_roads(rng: np.random.Generator, style: str) -> list[Road]:
    """Draw the roads of a world: a turned grid in towns, free curves in the country."""
    angle = rng.uniform(0, np.pi)
    if style == "urban":
        families = [
            (angle, rng.uniform(72, 100), 0.0),
            (angle + np.pi / 2, rng.uniform(72, 130), 0.0),
        ]
    elif style == "suburban":
        bend = rng.uniform(4, 22)
        turn = angle + np.pi / 2 + rng.normal(0, 0.12)
        families = [(angle, rng.uniform(85, 125), bend), (turn, rng.uniform(120, 190), bend / 2)]
    else:
        turn = angle + rng.uniform(0.9, 2.2)
        families = [(angle, rng.uniform(190, 260), 25.0), (turn, rng.uniform(220, 330), 30.0)]
    roads = []
    for direction, spacing, bend in families:
        wave, phase = rng.uniform(180, 420), rng.uniform(0, 2 * np.pi)
        offset = rng.uniform(-0.5, 0.5) * spacing
        for lane in np.arange(-380 + offset, 380, spacing):
            if style == "rural":
                wave, phase = rng.uniform(250, 500), rng.uniform(0, 2 * np.pi)
            points = _curve(direction, lane + rng.normal(0, spacing * 0.06), bend, wave, phase)
            if len(points) > 3:
                roads.append(_profile(rng, style, points))
    return roads


def _curve(direction: float, offset: float, bend: float, wave: float, phase: float) -> Points:
    along = np.array([np.cos(direction), np.sin(direction)])
    across = np.array([-along[1], along[0]])
    s = np.arange(-400.0, 400.0, 12.0 if bend else 24.0)
    sway = offset + bend * np.sin(2 * np.pi * s / wave + phase)
    points = SPAN / 2 + s[:, None] * along + sway[:, None] * across
    inside = np.flatnonzero(((points > -25) & (points < SPAN + 25)).all(axis=1))
    return points[inside[0] : inside[-1] + 1] if len(inside) else points[:0]


def _profile(rng: np.random.Generator, style: str, points: Points) -> Road:
    major = rng.random() < {"urban": 0.4, "suburban": 0.2, "rural": 0.3}[style]
    paved = style != "rural" or rng.random() < 0.65
    half = rng.uniform(5.0, 7.5) if major and paved else rng.uniform(3.2, 4.4)
    middle = Paint.YELLOW if rng.random() < 0.6 else Paint.WHITE
    return Road(
        points=points,
        half=half if paved else rng.uniform(1.8, 2.6),
        paved=paved,
        walk=0.0 if style == "rural" else rng.choice([0.0, 1.8, 2.5], p=[0.15, 0.4, 0.45]),
        centre=middle if paved and (major or rng.random() < 0.5) else Paint.ASPHALT,
        dashed=bool(rng.random() < 0.5),
    )


def measure_roads(roads: list[Road]) -> RoadField:
    """Distances to the roads; each piece of road touches only the cells of its own band."""
    shape = (CELLS, CELLS)
    field = RoadField(
        edge=np.full(shape, 99, np.float32),
        other=np.full(shape, 99, np.float32),
        across=np.zeros(shape, np.float32),
        along=np.zeros(shape, np.float32),
        road=np.full(shape, -1, np.int16),
    )
    for index, road in enumerate(roads):
        start = 0.0
        for a, b in zip(road.points[:-1], road.points[1:], strict=True):
            _measure_piece(field, index, road.half, a, b, start)
            start += float(np.hypot(*(b - a)))
    return field


def cut_patch(
    low: np.ndarray, high: np.ndarray
) -> tuple[tuple[slice, slice], Float[np.ndarray, "1 east"], Float[np.ndarray, "south 1"]]:
    """Cells of a box (metres, clipped to the world) and the coordinates of their centres."""
    (x0, y0) = np.clip(np.floor(low / CELL), 0, CELLS).astype(int)
    (x1, y1) = np.clip(np.ceil(high / CELL), 0, CELLS).astype(int)
    east = (np.arange(x0, x1, dtype=np.float32)[None] + 0.5) * CELL
    south = (np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5) * CELL
    return (slice(y0, y1), slice(x0, x1)), east, south


def _measure_piece(
    field: RoadField, index: int, half: float, a: np.ndarray, b: np.ndarray, start: float
) -> None:
    reach = half + REACH
    box, east, south = cut_patch(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
    edge = field.edge[box]
    if edge.size == 0:
        return
    length = float(np.hypot(*(b - a)))
    ux, uy = ((b - a) / length).astype(np.float32).tolist()
    x, y = east - np.float32(a[0]), south - np.float32(a[1])
    u = x * ux + y * uy
    v = y * ux - x * uy
    # Beyond the ends only the overhang counts, so that bends have no gaps.
    over = u - np.clip(u, 0, length)
    mine = np.sqrt(v * v + over * over) - half
    own = field.road[box] == index
    nearer = mine < np.minimum(edge, REACH)
    other = field.other[box]
    np.copyto(other, np.minimum(other, np.where(nearer, edge, mine)), where=~own)
    for target, value in ((edge, mine), (field.across[box], v), (field.along[box], u + start)):
        np.copyto(target, value, where=nearer)
    field.road[box][nearer] = index


def list_surfaces(roads: list[Road], field: RoadField) -> Iterator[tuple[np.ndarray, Paint]]:
    """Flat indices of cells, and the paint that the road gives them; later ones win."""
    cells = np.flatnonzero(field.edge < 2.6)
    edge, other = field.edge.ravel()[cells], field.other.ravel()[cells]
    across, along = np.abs(field.across.ravel()[cells]), field.along.ravel()[cells]
    road = field.road.ravel()[cells]
    paved = np.array([r.paved for r in roads])[road]
    half = np.array([r.half for r in roads], np.float32)[road]
    walk = np.array([r.walk for r in roads], np.float32)[road]
    centre = np.array([r.centre for r in roads])[road]
    dashed = np.array([r.dashed for r in roads])[road]
    yield cells[(edge > 0) & (edge < walk)], Paint.WALK
    yield cells[(edge <= 0) & ~paved], Paint.DIRT
    yield cells[(edge <= 0) & paved], Paint.ASPHALT
    open_road = (edge <= 0) & paved & (other > 5.0)
    middle = open_road & (across < 0.28) & (~dashed | (along % 8 < 4))
    yield cells[middle & (centre == Paint.WHITE)], Paint.WHITE
    yield cells[middle & (centre == Paint.YELLOW)], Paint.YELLOW
    side = open_road & (half > 4.8) & (edge > -0.75) & (edge < -0.25)
    yield cells[side], Paint.WHITE
    zebra = (edge < -0.3) & paved & (walk > 0) & (other > 0.8) & (other < 3.4)
    yield cells[zebra & (across % 1.6 < 0.8)], Paint.WHITE
