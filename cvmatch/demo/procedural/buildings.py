"""Buildings set along the roads, their driveways, parking lots and hedges."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8, UInt16

from cvmatch.demo.procedural.paints import BUILDINGS, FACADES, ROOFS, Paint
from cvmatch.demo.procedural.roads import CELL, CELLS, SPAN, Road, cut_patch

_HOMES, _TRADE, _FIELD = 0, 1, 3  # numbers of cvmatch.demo.procedural.world's uses of land


_CHANCE = {_HOMES: 0.9, _FIELD: 0.06}
"""Chance of a house at a free place, by use of land."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The ground on which a world is built. Arrays are in cells; `settle` changes them."""

    ground: Float[np.ndarray, "south east"]
    """Elevation of the bare ground, in metres."""
    top: Float[np.ndarray, "south east"]
    """Elevation with what stands on it."""
    paint: UInt16[np.ndarray, "south east"]
    """Paint of the surface."""
    use: UInt8[np.ndarray, "south east"]
    """Use of the land."""
    edge: Float[np.ndarray, "south east"]
    """Distance from the nearest carriageway, in metres; 99 where it is far."""
    style: str
    """urban, suburban or rural."""


@dataclass(frozen=True, kw_only=True)
class Houses:
    """Tables of the buildings: boxes on the map, and how their walls look."""

    centre: Float[np.ndarray, "building 2"]
    """Metres east and south."""
    axis: Float[np.ndarray, "building 2"]
    """Unit vector along the street."""
    half: Float[np.ndarray, "building 2"]
    """Half the length along the street, and across it, in metres."""
    base: Float[np.ndarray, " building"]
    """Elevation of the ground, in metres."""
    eaves: Float[np.ndarray, " building"]
    """Height of the walls, in metres."""
    roof: Float[np.ndarray, "building 3"]
    """Colour of the roof."""
    facade: Float[np.ndarray, "building 3"]
    """Colour of the walls."""
    window: Float[np.ndarray, "building 2"]
    """Distance between windows along the wall, and height of a floor, in metres."""
    shop: Float[np.ndarray, " building"]
    """1 where the ground floor is a shop window, else 0."""


@dataclass(frozen=True, kw_only=True)
class _Box:
    centre: np.ndarray
    axis: np.ndarray
    half: tuple[float, float]
    walls: float
    roof: str  # flat, gable or hip
    shop: bool
    look: int  # wings share the look of their house


@dataclass(frozen=True)
class _Town:
    site: Site
    boxes: list[_Box] = field(default_factory=list)
    stalls: list[np.ndarray] = field(default_factory=list)


def place_buildings(
    rng: np.random.Generator, site: Site, network: list[Road]
) -> tuple[Houses, Float[np.ndarray, "stall 4"]]:
    """Build along the roads; gives the buildings, and stalls (east, south, heading, chance)."""
    town = _Town(site)
    for road in network:
        if road.paved:
            for side in (-1, 1):
                _lots(rng, town, road)
                _street(rng, town, road, side)
    stalls = np.concatenate(town.stalls) if town.stalls else np.empty((0, 4))
    return _tables(rng, town), stalls


def _street(rng: np.random.Generator, town: _Town, road: Road, side: int) -> None:
    """Walk along one side of a road and build wherever there is room."""
    site = town.site
    at, along = road.stations(3.0)
    free_from = 0.0
    for step, (place, axis) in enumerate(zip(at, along, strict=True)):
        if step * 3.0 < free_from:
            continue
        normal = np.array([-axis[1], axis[0]]) * side
        row, col = ((place + normal * (road.half + 12))[::-1] / CELL).astype(int)
        if not (0 <= row < CELLS and 0 <= col < CELLS):
            continue
        box = _draw(rng, site, int(site.use[row, col]), len(town.boxes))
        if box is None:
            free_from = step * 3.0 + rng.uniform(3, 18)
            continue
        gap, setback, house = box
        away = road.half + road.walk + setback + house.half[1]
        house = _move(house, place + normal * away, axis)
        if not _fits(site, house.centre, axis, house.half):
            continue
        _raise(town, house)
        if house.roof != "flat":
            _garden(rng, town, house, normal, setback)
        free_from = step * 3.0 + house.half[0] * 2 + gap


def _draw(
    rng: np.random.Generator, site: Site, use: int, look: int
) -> tuple[float, float, _Box] | None:
    """Gap to the next building, setback from the road, and a building for this use of land."""
    zero = np.zeros(2)
    if use == _TRADE:
        tall = rng.random() < (0.4 if site.style == "urban" else 0.1)
        half = (rng.uniform(9, 20), rng.uniform(7, 13))
        walls = rng.uniform(10, 20) if tall else rng.uniform(4, 9)
        box = _Box(
            centre=zero, axis=zero, half=half, walls=walls, roof="flat", look=look,
            shop=bool(rng.random() < 0.7),
        )  # fmt: skip
        return rng.uniform(1, 9), rng.uniform(1, 6), box
    if rng.random() < _CHANCE.get(use, 0.0):
        rows = site.style == "urban" and rng.random() < 0.7
        half = (rng.uniform(6, 11), rng.uniform(5, 7)) if rows else (
            rng.uniform(5, 9), rng.uniform(4.2, 6.5))  # fmt: skip
        walls = rng.uniform(6.5, 12.5) if rows else rng.uniform(3.0, 6.2)
        roof = str(rng.choice(["gable", "hip", "flat"], p=[0.55, 0.3, 0.15]))
        box = _Box(centre=zero, axis=zero, half=half, walls=walls, roof=roof, look=look, shop=False)
        gap = rng.choice([0.5, 5.0]) if rows else rng.uniform(3, 8)
        return gap, rng.uniform(1, 4) if rows else rng.uniform(4, 10), box
    return None


def _move(box: _Box, centre: np.ndarray, axis: np.ndarray) -> _Box:
    return _Box(
        centre=centre, axis=axis, half=box.half, walls=box.walls, roof=box.roof, shop=box.shop,
        look=box.look,
    )  # fmt: skip


_PROBE = np.stack(np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5)), axis=-1).reshape(-1, 2)


def _fits(
    site: Site, centre: np.ndarray, axis: np.ndarray, half: tuple[float, float], room: float = 1.0
) -> bool:
    """Whether a box, with `room` metres around it, is inside the world and on free dry ground."""
    local = _PROBE * (half[0] + room, half[1] + room)
    x = centre[0] + local[:, 0] * axis[0] - local[:, 1] * axis[1]
    y = centre[1] + local[:, 0] * axis[1] + local[:, 1] * axis[0]
    if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= SPAN:
        return False
    row, col = (y / CELL).astype(int), (x / CELL).astype(int)
    paint = site.paint[row, col]
    taken = (paint >= BUILDINGS) | (paint == Paint.WATER) | (paint == Paint.PARKING)
    return not (taken | (site.edge[row, col] < 0.8 + room)).any()


def _local(
    centre: np.ndarray, axis: np.ndarray, half: tuple[float, float]
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Cells around a box, and their coordinates along and across it."""
    spread = np.abs(axis) * half[0] + np.abs(axis[::-1]) * half[1]
    box, east, south = cut_patch(centre - spread, centre + spread)
    x, y = east - np.float32(centre[0]), south - np.float32(centre[1])
    ux, uy = np.float32(axis[0]), np.float32(axis[1])
    return box, x * ux + y * uy, y * ux - x * uy


def _raise(town: _Town, house: _Box) -> None:
    """Put a building into the height field."""
    site = town.site
    box, p, q = _local(house.centre, house.axis, house.half)
    a, b = house.half
    inside = (np.abs(p) <= a) & (np.abs(q) <= b)
    rise = 0.0
    if house.roof == "gable":
        rise = np.minimum(0.75 * (b - np.abs(q)), 4.0)
    elif house.roof == "hip":
        rise = np.minimum(0.75 * np.minimum(b - np.abs(q), a - np.abs(p)), 4.0)
    np.copyto(site.top[box], _base(site, house) + house.walls + rise, where=inside)
    site.paint[box][inside] = BUILDINGS + len(town.boxes)
    town.boxes.append(house)


def _base(site: Site, house: _Box) -> float:
    column, row = np.clip(house.centre / CELL, 0, CELLS - 1).astype(int)
    return float(site.ground[row, column])


def _garden(
    rng: np.random.Generator, town: _Town, house: _Box, normal: np.ndarray, setback: float
) -> None:
    """A wing, a driveway to the road and a hedge behind, each by chance."""
    a, b = house.half
    axis, look = house.axis, house.look
    if rng.random() < 0.3:
        half = (a * 0.45, b * 0.5)
        centre = house.centre + axis * (0.55 * a) + normal * (b + half[1])
        wing = _Box(
            centre=centre, axis=axis, half=half, walls=house.walls * 0.8, roof="hip", shop=False,
            look=look,
        )  # fmt: skip
        if setback > half[1] * 2 + 1.0:
            _raise(town, wing)
    if rng.random() < 0.75:
        way = house.centre - axis * (a - 1.6) - normal * (b + setback / 2)
        _cover(town.site, way, axis, (1.5, setback / 2 + 0.6), Paint.DRIVE)
        heading = float(np.arctan2(normal[1], normal[0]))
        if setback > 5:
            town.stalls.append(np.array([[*way, heading, 0.5]]))
    if rng.random() < 0.35:
        back = house.centre + normal * (b + rng.uniform(5, 9))
        _cover(town.site, back, axis, (a + 3, 0.6), Paint.HEDGE, rng.uniform(1.0, 1.9))
    if rng.random() < 0.35:
        end = house.centre + axis * (a + 1.9)
        _cover(town.site, end, axis, (0.5, b + 3), Paint.HEDGE, rng.uniform(0.9, 1.6))


def _cover(
    site: Site,
    centre: np.ndarray,
    axis: np.ndarray,
    half: tuple[float, float],
    paint: Paint,
    height: float = 0.0,
) -> None:
    """Paint a rectangle, `height` metres high, where no road, water or building is."""
    box, p, q = _local(centre, axis, half)
    old = site.paint[box]
    free = (site.edge[box] > 0) & (old < BUILDINGS) & (old != Paint.WATER)
    free &= (np.abs(p) <= half[0]) & (np.abs(q) <= half[1])
    old[free] = paint
    if height:
        np.copyto(site.top[box], site.ground[box] + np.float32(height), where=free)


def _lots(rng: np.random.Generator, town: _Town, road: Road) -> None:
    """Parking lots beside a road in trading areas, with painted stalls."""
    site = town.site
    at, along = road.stations(23.0, rng.uniform(0, 20))
    for place, axis in zip(at, along, strict=True):
        side = rng.choice([-1, 1])
        half = (rng.uniform(11, 20), rng.choice([8.0, 16.5]))
        normal = np.array([-axis[1], axis[0]]) * side
        centre = place + normal * (road.half + road.walk + 1.5 + half[1])
        row, col = np.clip(centre[::-1] / CELL, 0, CELLS - 1).astype(int)
        if site.use[row, col] != _TRADE or rng.random() < 0.6:
            continue
        if _fits(site, centre, axis, half, room=0.5):
            _cover(site, centre, axis, half, Paint.PARKING)
            town.stalls.append(_stalls(site, centre, axis, half))


def _stalls(
    site: Site, centre: np.ndarray, axis: np.ndarray, half: tuple[float, float]
) -> Float[np.ndarray, "stall 4"]:
    """Rows of stalls 2.8 m wide and 5 m deep along both sides of aisles; draws their lines."""
    box, p, q = _local(centre, axis, half)
    inside = (np.abs(p) < half[0] - 0.8) & (np.abs(q) < half[1])
    rows = np.arange(-half[1] + 2.6, half[1], 16.4)
    rows = np.concatenate([rows, rows[1:] - 5.2, [half[1] - 2.6]])
    for row in rows:
        line = inside & (np.abs(q - row) < 2.4) & ((p + half[0]) % 2.8 < 0.5)
        site.paint[box][line] = Paint.WHITE
    spots = np.arange(-half[0] + 1.7, half[0] - 1.4, 2.8)
    u, v = (part.ravel() for part in np.meshgrid(spots, rows))
    x = centre[0] + u * axis[0] - v * axis[1]
    y = centre[1] + u * axis[1] + v * axis[0]
    heading = np.arctan2(axis[0], -axis[1])
    return np.column_stack([x, y, np.full(len(x), heading), np.full(len(x), 0.45)])


def _tables(rng: np.random.Generator, town: _Town) -> Houses:
    boxes = town.boxes
    count = len(boxes)
    flat = np.array([box.roof == "flat" for box in boxes], bool)
    look = np.array([box.look for box in boxes], int)
    pitched = rng.integers(len(ROOFS) - 2, size=count)
    kind = np.where(flat, rng.integers(2, len(ROOFS), size=count), pitched)[look]
    roof = np.array(ROOFS)[kind] * rng.normal(1, 0.07, (count, 1))[look]
    wall = rng.integers(len(FACADES), size=count)[look]
    facade = np.array(FACADES)[wall] * rng.normal(1, 0.06, (count, 1))[look]
    return Houses(
        centre=np.array([box.centre for box in boxes], np.float32).reshape(count, 2),
        axis=np.array([box.axis for box in boxes], np.float32).reshape(count, 2),
        half=np.array([box.half for box in boxes], np.float32).reshape(count, 2),
        base=np.array([_base(town.site, box) for box in boxes], np.float32),
        eaves=np.array([box.walls for box in boxes], np.float32),
        roof=roof.astype(np.float32),
        facade=np.clip(facade, 0.05, 0.95).astype(np.float32),
        window=np.stack([rng.uniform(2.0, 3.6, count), rng.uniform(2.7, 3.4, count)], 1),
        shop=np.array([box.shop for box in boxes], np.float32),
    )
