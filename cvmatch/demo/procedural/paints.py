"""What the surfaces of a world are made of: one number per cell, and its look in these tables."""

import enum
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

IMPERVIOUS, CLUTTER, TREE, BUILDING, LOW, CAR = range(6)
"""Class ids, in the order of cvmatch.data.schema.PALETTE."""

SKY, MAN_MADE, ROAD, PLANTS = range(4)
"""Ids of the ground annotation, as in CVUSA's streetview/annotations."""


class Season(enum.IntEnum):
    """Which seasonal tint a paint takes in a view."""

    NONE = 0
    GRASS = 1
    CROP = 2
    LEAVES = 3
    NEEDLES = 4


class Paint(enum.IntEnum):
    """Fixed paints; parcels of farm land, crowns, cars and buildings follow them."""

    ASPHALT = 0
    WALK = 1
    WHITE = 2
    YELLOW = 3
    DIRT = 4
    DRIVE = 5
    PARKING = 6
    PAVING = 7
    LAWN = 8
    MEADOW = 9
    FOREST = 10
    WATER = 11
    BARE = 12
    HEDGE = 13
    TRUNK = 14


FIELDS, CROWNS, CARS, BUILDINGS = 15, 27, 43, 59
"""First number of each family: 12 crops, 16 kinds of crown, 16 colours of cars, then buildings."""

_FIXED = (  # red, green, blue in [0, 1]; class; annotation; season; strength of the texture
    ((0.33, 0.33, 0.34), IMPERVIOUS, ROAD, Season.NONE, 0.05),  # asphalt
    ((0.60, 0.58, 0.55), IMPERVIOUS, ROAD, Season.NONE, 0.05),  # side-walk
    ((0.86, 0.86, 0.84), IMPERVIOUS, ROAD, Season.NONE, 0.04),  # white marks
    ((0.80, 0.64, 0.22), IMPERVIOUS, ROAD, Season.NONE, 0.04),  # yellow marks
    ((0.55, 0.45, 0.33), CLUTTER, ROAD, Season.NONE, 0.12),  # dirt track
    ((0.58, 0.56, 0.53), IMPERVIOUS, ROAD, Season.NONE, 0.06),  # driveway
    ((0.40, 0.40, 0.41), IMPERVIOUS, ROAD, Season.NONE, 0.06),  # parking lot
    ((0.56, 0.54, 0.51), IMPERVIOUS, ROAD, Season.NONE, 0.08),  # paved yard
    ((0.30, 0.44, 0.19), LOW, PLANTS, Season.GRASS, 0.13),  # lawn
    ((0.37, 0.44, 0.22), LOW, PLANTS, Season.GRASS, 0.20),  # meadow
    ((0.17, 0.24, 0.11), TREE, PLANTS, Season.LEAVES, 0.25),  # forest floor
    ((0.16, 0.25, 0.29), CLUTTER, PLANTS, Season.NONE, 0.03),  # water
    ((0.56, 0.46, 0.34), CLUTTER, PLANTS, Season.NONE, 0.18),  # bare soil
    ((0.17, 0.30, 0.12), LOW, PLANTS, Season.NEEDLES, 0.22),  # hedge
    ((0.27, 0.21, 0.16), TREE, PLANTS, Season.NONE, 0.20),  # trunk
)
_CROPS = ((0.45, 0.50, 0.22), (0.33, 0.48, 0.19), (0.66, 0.57, 0.32), (0.54, 0.52, 0.26))
_CARS = (
    *((0.90, 0.90, 0.90), (0.70, 0.71, 0.73), (0.10, 0.10, 0.11), (0.35, 0.36, 0.38)),
    *((0.55, 0.09, 0.09), (0.12, 0.22, 0.45), (0.84, 0.84, 0.82), (0.22, 0.23, 0.25)),
    *((0.16, 0.33, 0.26), (0.60, 0.53, 0.40), (0.80, 0.80, 0.82), (0.50, 0.51, 0.54)),
    *((0.93, 0.93, 0.92), (0.14, 0.14, 0.16), (0.68, 0.13, 0.11), (0.25, 0.40, 0.60)),
)
ROOFS = (
    *((0.55, 0.30, 0.22), (0.48, 0.26, 0.20), (0.36, 0.34, 0.34), (0.44, 0.42, 0.41)),
    *((0.31, 0.29, 0.28), (0.50, 0.44, 0.37), (0.62, 0.60, 0.58), (0.74, 0.73, 0.71)),
)
"""Colours of roofs; the last two are for flat roofs."""
FACADES = (
    *((0.80, 0.76, 0.68), (0.87, 0.86, 0.83), (0.60, 0.33, 0.25), (0.70, 0.60, 0.46)),
    *((0.55, 0.57, 0.58), (0.78, 0.70, 0.50), (0.58, 0.64, 0.68), (0.66, 0.44, 0.36)),
)
"""Colours of walls, drawn independently of the roof's."""


@dataclass(frozen=True, kw_only=True)
class Paints:
    """The tables of one world, indexed by paint."""

    colour: Float[np.ndarray, "paint 3"]
    """Albedo, RGB in [0, 1]."""
    classes: UInt8[np.ndarray, " paint"]
    """Class id in the aerial tile."""
    ground: UInt8[np.ndarray, " paint"]
    """Id in the ground annotation."""
    season: UInt8[np.ndarray, " paint"]
    """Season, the seasonal tint that a view applies."""
    grain: Float[np.ndarray, " paint"]
    """Standard deviation of the relative brightness within the paint."""


def mix_paints(
    rng: np.random.Generator, roofs: Float[np.ndarray, "building 3"], leafy: float
) -> Paints:
    """Tables of a world with these roofs; `leafy` is the share of broad-leaved crowns, 0 to 1."""
    crops = np.array(_CROPS)[rng.integers(len(_CROPS), size=12)] * rng.normal(1, 0.08, (12, 3))
    kinds = rng.random(16) < leafy
    kinds[:2], kinds[2:4] = True, False
    crowns = np.where(kinds[:, None], (0.24, 0.37, 0.15), (0.13, 0.27, 0.14))
    crowns = crowns * rng.normal(1, 0.13, (16, 1)) * rng.normal(1, 0.06, (16, 3))
    fixed = np.array([row[0] for row in _FIXED])
    fixed[: Paint.FOREST] *= rng.normal(1, 0.07, (Paint.FOREST, 1))
    families = (
        (crops, LOW, PLANTS, Season.CROP, 0.14),
        (crowns, TREE, PLANTS, np.where(kinds, Season.LEAVES, Season.NEEDLES), 0.16),
        (np.array(_CARS), CAR, MAN_MADE, Season.NONE, 0.02),
        (roofs, BUILDING, MAN_MADE, Season.NONE, 0.05),
    )

    def column(index: int) -> np.ndarray:
        rest = [np.broadcast_to(family[index], len(family[0])) for family in families]
        return np.concatenate([[row[index] for row in _FIXED], *rest])

    return Paints(
        colour=np.clip(np.concatenate([fixed, *(f[0] for f in families)]), 0.02, 0.98).astype("f4"),
        classes=column(1).astype(np.uint8),
        ground=column(2).astype(np.uint8),
        season=column(3).astype(np.uint8),
        grain=column(4).astype(np.float32),
    )
