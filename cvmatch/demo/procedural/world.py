"""A place: terrain, land use, roads, buildings, trees, and where its cameras stand."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8, UInt16
from PIL import Image

from cvmatch.demo.procedural import buildings, plants, roads
from cvmatch.demo.procedural.paints import FIELDS, Paint, Paints, mix_paints
from cvmatch.demo.procedural.roads import CELL, CELLS, SPAN

EDGE = 112.0
"""Least distance of a camera from the edge of its world, in metres: it sees 108 m."""
SPACING = 62.0
"""Wanted distance between the cameras of a world, in metres."""

HOMES, TRADE, FOREST, FIELD, PARK, WATER, BARE = range(7)
"""Uses of land."""
_USES = {  # share of the parcels of each use, by style
    "urban": (0.36, 0.30, 0.03, 0.00, 0.15, 0.04, 0.12),
    "suburban": (0.50, 0.08, 0.10, 0.10, 0.09, 0.03, 0.10),
    "rural": (0.08, 0.02, 0.16, 0.50, 0.03, 0.05, 0.16),
}


@dataclass(frozen=True, kw_only=True)
class World:
    """512 m x 512 m in cells of 0.5 m, without what moves. Row 0 is north, column 0 west."""

    top: Float[np.ndarray, "south east"]
    """Elevation of the ground and of what stands on it, without crowns, in metres."""
    paint: UInt16[np.ndarray, "south east"]
    """What that surface is made of."""
    grain: Float[np.ndarray, "south east"]
    """Relative brightness of that surface and of the crowns, near 1."""
    crown_top: Float[np.ndarray, "south east"]
    """Elevation of the crown's upper side, in metres; -1000 where there is no crown."""
    crown_bottom: Float[np.ndarray, "south east"]
    """Elevation of its lower side; 1000 where there is no crown."""
    crown: UInt8[np.ndarray, "south east"]
    """The crown's paint."""
    paints: Paints
    """Tables of the paints."""
    houses: buildings.Houses
    """The buildings; building b has paint BUILDINGS + b."""
    slots: Float[np.ndarray, "slot 4"]
    """Where a car may stand: east, south (metres), heading (radians), probability."""
    roads: list[roads.Road]
    """The roads."""
    seed: int
    """The seed that made it."""


def build_world(seed: int) -> World:
    """Make the world of a seed; a pure function, about 0.4 CPU seconds."""
    rng = np.random.default_rng([seed, 0])
    style = str(rng.choice(["urban", "suburban", "rural"], p=[0.3, 0.4, 0.3]))
    ground = _ground(rng)
    use, paint, rows = _land(rng, style)
    network = roads.lay_roads(rng, style)
    field = roads.measure_roads(network)
    for cells, kind in roads.list_surfaces(network, field):
        paint.ravel()[cells] = kind
    top = ground.copy()
    site = buildings.Site(
        ground=ground, top=top, paint=paint, use=use, edge=field.edge, style=style
    )
    houses, stalls = buildings.place_buildings(rng, site, network)
    crown_top, crown_bottom, crown = plants.place_trees(rng, site, network)
    paints = mix_paints(rng, houses.roof, leafy=rng.uniform(0.3, 1.0))
    return World(
        top=top,
        paint=paint,
        grain=_grain(rng, paint, paints, rows),
        crown_top=crown_top,
        crown_bottom=crown_bottom,
        crown=crown,
        paints=paints,
        houses=houses,
        slots=np.concatenate([stalls, *_lanes(network)]),
        roads=network,
        seed=seed,
    )


def make_noise(rng: np.random.Generator, nodes: int, size: int) -> Float[np.ndarray, "size size"]:
    """Smooth noise of unit variance at its `nodes` x `nodes` control points."""
    coarse = rng.standard_normal((nodes, nodes), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _ground(rng: np.random.Generator) -> Float[np.ndarray, "south east"]:
    relief = make_noise(rng, 6, CELLS) + 0.25 * make_noise(rng, 14, CELLS)
    low, high = float(relief.min()), float(relief.max())
    return (relief - low) * (rng.uniform(3, 9) / (high - low))


def _land(
    rng: np.random.Generator, style: str
) -> tuple[UInt8[np.ndarray, "s e"], UInt16[np.ndarray, "s e"], Float[np.ndarray, "s e"]]:
    """Use and paint of the ground by warped Voronoi parcels, and the furrows of the fields."""
    half = CELLS // 2
    count = {"urban": 42, "suburban": 36, "rural": 30}[style]
    sites = rng.uniform(-20, SPAN + 20, (count, 2)).astype(np.float32)
    axis = (np.arange(half, dtype=np.float32) + 0.5) * 2 * CELL
    warp = rng.uniform(4, 12)
    x = (axis[None] + warp * make_noise(rng, 12, half)).ravel()
    y = (axis[:, None] + warp * make_noise(rng, 12, half)).ravel()
    # |p - s|^2 without |p|^2, which is the same for all sites.
    distance = np.stack([x, y, np.ones_like(x)], axis=1) @ np.vstack(
        [-2 * sites.T, (sites**2).sum(axis=1)]
    )
    parcel = distance.argmin(axis=1).astype(np.uint8).reshape(half, half)
    uses = rng.choice(7, size=count, p=_USES[style]).astype(np.uint8)
    paints = np.array([_soil(rng, kind) for kind in uses.tolist()], np.uint16)
    angle = rng.uniform(0, np.pi, count).astype(np.float32)
    wave = np.float32(2 * np.pi) / rng.uniform(2.5, 7.0, count).astype(np.float32)
    farm = np.isin(uses, FIELD)[parcel]
    rows = np.zeros((half, half), np.float32)
    where = parcel[farm]
    u = x.reshape(half, half)[farm] * np.cos(angle)[where]
    u += y.reshape(half, half)[farm] * np.sin(angle)[where]
    rows[farm] = np.sin(u * wave[where])
    use, paint, rows = (_double(layer) for layer in (uses[parcel], paints[parcel], rows))
    return use, paint, rows


def _double(layer: np.ndarray) -> np.ndarray:
    return layer.repeat(2, axis=0).repeat(2, axis=1)


def _soil(rng: np.random.Generator, use: int) -> int:
    if use == TRADE:
        return int(rng.choice([Paint.PAVING, Paint.LAWN], p=[0.6, 0.4]))
    if use == FIELD:
        bare = rng.random() < 0.12
        return int(Paint.BARE if bare else FIELDS + rng.integers(12))
    plain = {HOMES: Paint.LAWN, FOREST: Paint.FOREST, WATER: Paint.WATER, BARE: Paint.BARE}
    return int(plain.get(use, Paint.MEADOW if rng.random() < 0.5 else Paint.LAWN))


def _grain(
    rng: np.random.Generator,
    paint: UInt16[np.ndarray, "s e"],
    paints: Paints,
    rows: Float[np.ndarray, "s e"],
) -> Float[np.ndarray, "s e"]:
    fine = rng.standard_normal((CELLS // 2, CELLS // 2), dtype=np.float32)
    grain = np.tile(fine, (2, 2))
    grain *= 0.55
    grain += 0.6 * make_noise(rng, 160, CELLS)
    grain += 0.6 * make_noise(rng, 24, CELLS)
    grain += rows
    grain *= paints.grain[paint]
    grain += 1
    return np.maximum(grain, 0.3, out=grain)


def _lanes(network: list[roads.Road]) -> Iterator[Float[np.ndarray, "slot 4"]]:
    """Places of moving and of parked cars along the roads."""
    for road, side in itertools.product(network, (-1, 1)):
        parked = road.half > 4.8 and road.walk > 0
        for offset, step, chance in ((0.42, 11.0, 0.16), (0.84, 6.5, 0.40 if parked else 0.0)):
            if chance == 0:
                continue
            at, along = road.stations(step, 3.0)
            normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
            place = at + normal * (side * offset * (road.half if parked else road.half * 1.1))
            heading = np.arctan2(along[:, 1], along[:, 0])
            busy = chance if road.paved else chance / 4
            yield np.column_stack([place, heading, np.full(len(at), busy)])


def place_cameras(world: World) -> Iterator[Float[np.ndarray, "2"]]:
    """Endless positions of cameras on roads, metres east and south, on corners of cells.

    The n-th does not depend on how many are taken. They keep SPACING; where no more fit, the
    spacing shrinks step by step, so there is always another one.
    """
    rng = np.random.default_rng([world.seed, 1])
    candidates = _standpoints(world.roads)
    taken = np.empty((0, 2))
    spacing = SPACING
    while True:
        order = rng.permutation(len(candidates))
        for candidate in candidates[order]:
            place = candidate + rng.uniform(-0.5, 0.5, 2)
            place = np.clip(np.round(place / CELL) * CELL, EDGE, SPAN - EDGE)
            if (np.hypot(*(taken - place).T) >= spacing).all():
                taken = np.vstack([taken, place])
                yield place
        # At last the same place may serve twice.
        spacing = spacing * 0.9 if spacing > CELL else 0.0


def _standpoints(network: list[roads.Road]) -> Float[np.ndarray, "place 2"]:
    """Middles of lanes every 6 m, inside the world's margin; its centre where no road passes."""
    places = []
    for road, side in itertools.product(network, (-1, 1)):
        at, along = road.stations(6.0, 1.0)
        places.append(at + np.stack([-along[:, 1], along[:, 0]], axis=1) * (side * 0.4 * road.half))
    every = np.concatenate([*places, np.empty((0, 2))])
    inside = ((every > EDGE) & (every < SPAN - EDGE)).all(axis=1)
    return every[inside] if inside.any() else np.full((1, 2), SPAN / 2)
