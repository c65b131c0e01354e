"""Pictures to pre-train on: worlds of the `pretrain` family, rendered by all cores, in memory."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from cvmatch.demo.procedural.pairs import Sizes, render_pairs, render_tiles, world_seed

log = logging.getLogger(__name__)

SIZES = Sizes(aerial=128, panorama=(64, 256))
"""Pixels of the toy data sets' pictures."""

CAMERAS = 24
"""Pairs of a world."""


class PairArrays(NamedTuple):
    """Pairs as arrays, RGB in [0, 255]; classes are ids 0 to 5."""

    aerial: UInt8[np.ndarray, "pair 128 128 3"]
    classes: UInt8[np.ndarray, "pair 128 128"]
    panorama: UInt8[np.ndarray, "pair 64 256 3"]


class TileArrays(NamedTuple):
    """Tiles alone as arrays, RGB in [0, 255]; classes are ids 0 to 5."""

    aerial: UInt8[np.ndarray, "tile side side 3"]
    classes: UInt8[np.ndarray, "tile side side"]


def render_places(worlds: int, seed: int) -> PairArrays:
    """Render all pairs of `worlds` worlds that no data set contains (70 ms of one core a pair)."""
    return PairArrays(*_render_worlds(partial(_render_places, seed), worlds, "places"))


def render_tile_arrays(worlds: int, seed: int, side: int) -> TileArrays:
    """Render their tiles alone, `side` pixels wide (20 ms of one core a tile)."""
    return TileArrays(*_render_worlds(partial(_render_tiles, seed, side), worlds, "tiles"))


def _render_worlds(
    render: Callable[[int], tuple[np.ndarray, ...]], worlds: int, name: str
) -> Iterator[np.ndarray]:
    """Render the worlds on all cores; returns each array of all of them, in order."""
    spawn = multiprocessing.get_context("spawn")
    parts = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        for part in pool.map(render, range(worlds)):
            parts.append(part)
            if len(parts) % 10 == 0:
                log.info("%s: world %d of %d", name, len(parts), worlds)
    return (np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _render_places(seed: int, index: int) -> PairArrays:
    found = list(render_pairs(world_seed(seed, index, "pretrain"), CAMERAS, SIZES))
    return PairArrays(
        np.stack([pair.aerial for pair in found]),
        np.stack([pair.classes for pair in found]),
        np.stack([pair.panorama for pair in found]),
    )


def _render_tiles(seed: int, side: int, index: int) -> TileArrays:
    found = render_tiles(world_seed(seed, index, "pretrain"), CAMERAS, side)
    return TileArrays(*(np.stack(arrays) for arrays in zip(*found, strict=True)))
