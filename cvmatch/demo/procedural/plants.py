"""Trees: crowns as a second layer over trunks, so that one can look under them."""

import functools

import numpy as np
from jaxtyping import Float, UInt8

from cvmatch.demo.procedural.buildings import Site
from cvmatch.demo.procedural.paints import BUILDINGS, CROWNS, Paint
from cvmatch.demo.procedural.roads import CELL, CELLS, SPAN, Road

_CHANCE = np.array([0.16, 0.04, 0.92, 0.003, 0.20, 0.0, 0.015], np.float32)
"""Chance of a tree at a node of a 6 m grid, by use of land (cvmatch.demo.procedural.world)."""

Layer = Float[np.ndarray, "south east"]


def place_trees(
    rng: np.random.Generator, site: Site, network: list[Road]
) -> tuple[Layer, Layer, UInt8[np.ndarray, "south east"]]:
    """Plant woods, gardens and streets; gives the crowns' top, bottom and paint."""
    top = np.full((CELLS, CELLS), -1000, np.float32)
    bottom = np.full((CELLS, CELLS), 1000, np.float32)
    paint = np.zeros((CELLS, CELLS), np.uint8)
    places = np.concatenate([_scatter(rng, site), *_avenues(rng, network)])
    places = places[((places > 6) & (places < SPAN - 6)).all(axis=1)]
    col, row = (places / CELL).astype(int).T
    old = site.paint[row, col]
    free = (site.edge[row, col] > 0.7) & (old < BUILDINGS)
    free &= ~np.isin(old, (Paint.WATER, Paint.PARKING, Paint.DRIVE, Paint.HEDGE))
    _crowns(rng, site, row[free], col[free], (top, bottom, paint))
    return top, bottom, paint


def _scatter(rng: np.random.Generator, site: Site) -> Float[np.ndarray, "tree 2"]:
    nodes = np.arange(3.0, SPAN, 6.0)
    places = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    places = places + rng.uniform(-2.6, 2.6, places.shape)
    col, row = np.clip(places / CELL, 0, CELLS - 1).astype(int).T
    return places[rng.random(len(places)) < _CHANCE[site.use[row, col]]]


def _avenues(rng: np.random.Generator, network: list[Road]) -> list[Float[np.ndarray, "tree 2"]]:
    rows = [np.empty((0, 2))]
    for road in network:
        for side in (-1, 1):
            if rng.random() < 0.45:
                at, along = road.stations(rng.uniform(8, 16), rng.uniform(0, 9))
                normal = np.stack([-along[:, 1], along[:, 0]], axis=1) * side
                place = at + normal * (road.half + max(road.walk - 0.6, 1.5))
                rows.append(place[rng.random(len(place)) < 0.75])
    return rows


@functools.cache
def _stamp(radius: int, conic: bool, variant: int) -> tuple[Layer, Layer]:
    """Upper and lower side of a crown of unit height, lumpy; NaN-free, -1 outside the disc."""
    rng = np.random.default_rng([radius, conic, variant])
    axis = np.arange(-radius, radius + 1, dtype=np.float32) / (radius + 0.4)
    angle = np.arctan2(axis[:, None], axis[None])
    lobes = 1 + 0.10 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.07 * np.sin(5 * angle + variant)
    rho = np.hypot(axis[:, None], axis[None]) / lobes
    dome = np.sqrt(np.clip(1 - rho**2, 0, 1))
    upper = np.clip(1 - rho, 0, 1) if conic else 0.45 + 0.55 * dome
    lower = np.zeros_like(rho) if conic else 0.45 * (1 - dome)
    bumps = rng.uniform(-0.10, 0.10, rho.shape).astype(np.float32)
    inside = rho < 1
    return (
        np.where(inside, np.maximum(upper + bumps, lower + 0.05), -1).astype(np.float32),
        np.where(inside, lower, -1).astype(np.float32),
    )


def _crowns(
    rng: np.random.Generator,
    site: Site,
    rows: np.ndarray,
    cols: np.ndarray,
    layers: tuple[Layer, Layer, UInt8[np.ndarray, "south east"]],
) -> None:
    """Stamp one crown over each place, and its trunk into the ground's height field."""
    top, bottom, paint = layers
    count = len(rows)
    radius = rng.integers(3, 9, count)  # cells: 1.5 to 4 m
    kind = rng.integers(16, size=count)
    conic = (kind % 4 == 3) & (rng.random(count) < 0.8)
    height = np.where(conic, 2.6, 1.9) * radius * CELL * rng.uniform(0.85, 1.2, count) + 2.0
    clear = np.where(conic, 0.10, rng.uniform(0.18, 0.34, count)) * height
    ground = site.ground[rows, cols]
    low, depth = (ground + clear).astype(np.float32), (height - clear).astype(np.float32)
    variant = rng.integers(4, size=count)
    trees = zip(rows, cols, radius, kind, conic, variant, low, depth, strict=True)
    for row, col, r, k, cone, form, base, rise in trees:
        upper, lower = _stamp(int(r), bool(cone), int(form))
        box = (slice(row - r, row + r + 1), slice(col - r, col + r + 1))
        inside = upper >= 0
        over = base + rise * upper
        over[~inside] = -1000
        under = base + rise * lower
        np.minimum(bottom[box], under, out=bottom[box], where=inside)
        higher = over > top[box]
        np.copyto(top[box], over, where=higher)
        paint[box][higher] = CROWNS + k
    site.top[rows, cols] = low + 0.5
    site.paint[rows, cols] = Paint.TRUNK
