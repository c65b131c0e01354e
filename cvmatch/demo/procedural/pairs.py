"""Pairs of pictures of the places of one world."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from cvmatch.demo.procedural.aerial import render_aerial
from cvmatch.demo.procedural.panorama import render_panorama
from cvmatch.demo.procedural.roads import SPAN
from cvmatch.demo.procedural.world import build_world, place_cameras
from cvmatch.demo.settings import Difficulty

_FAMILIES = ("data", "pretrain")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the pictures, in pixels."""

    aerial: int = 370
    """Side of the tile and of its class map."""
    panorama: tuple[int, int] = (224, 1232)
    """Height and width of the panorama."""


@dataclass(frozen=True)
class Pair:
    """One place from above and from the street."""

    aerial: UInt8[np.ndarray, "size size 3"]
    """RGB tile, north up, 128 m wide."""
    classes: UInt8[np.ndarray, "size size"]
    """Class ids of the tile, in the order of schema.PALETTE."""
    panorama: UInt8[np.ndarray, "height width 3"]
    """RGB, north in the middle column, column 0 south, W/4 west."""
    annotation: UInt8[np.ndarray, "height width"]
    """Ids of the panorama: 0 sky, 1 man-made, 2 road, 3 vegetation."""
    east: float
    """Metres of the tile's centre from the world's south-west corner."""
    north: float
    """The same, northward."""


def world_seed(seed: int, index: int, family: Literal["data", "pretrain"] = "data") -> int:
    """Return the seed of the index-th world of a data set; its last bit tells the families."""
    number = _FAMILIES.index(family)
    state = np.random.SeedSequence([seed, index, number]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1)) * 2 + number


def render_pairs(
    seed: int, cameras: int, sizes: Sizes, difficulty: Difficulty | None = None
) -> Iterator[Pair]:
    """Render the first `cameras` pairs of a world, each independent of how many there are.

    A pure function of its arguments. Cameras stand 62 m apart while they fit, then closer.
    """
    difficulty = difficulty or Difficulty()
    world = build_world(seed)
    for index, at in enumerate(itertools.islice(place_cameras(world), cameras)):
        above, street, error = _make_generators(seed, index)
        tile, classes = render_aerial(above, world, at, sizes.aerial)
        turn = error.normal(0, 1) * difficulty.heading_noise
        shift = np.clip(error.normal(0, 1, 2), -3, 3) * difficulty.camera_offset
        stand = np.clip(at + shift, 1, SPAN - 1)
        view, annotation = render_panorama(street, world, stand, sizes.panorama, turn)
        yield Pair(tile, classes, view, annotation, float(at[0]), SPAN - float(at[1]))


def render_tiles(
    seed: int, cameras: int, size: int
) -> Iterator[tuple[UInt8[np.ndarray, "{size} {size} 3"], UInt8[np.ndarray, "{size} {size}"]]]:
    """Render the tiles of `render_pairs` and their class ids, in an eighth of the time."""
    world = build_world(seed)
    for index, at in enumerate(itertools.islice(place_cameras(world), cameras)):
        above, _, _ = _make_generators(seed, index)
        yield render_aerial(above, world, at, size)


def _make_generators(seed: int, index: int) -> tuple[np.random.Generator, ...]:
    """Three streams, so that neither view's draws depend on the other's size or settings."""
    return tuple(np.random.default_rng([seed, 2, index, stream]) for stream in range(3))
