"""The aerial tile and its class map."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cvmatch.demo.procedural.paints import BUILDINGS, CARS, TREE
from cvmatch.demo.procedural.roads import CELL
from cvmatch.demo.procedural.view import (
    add_crowns,
    apply_light,
    cut_window,
    develop,
    sample_photometry,
    shade_slopes,
    trace_sunlight,
)
from cvmatch.demo.procedural.world import World

TILE = 128.0
"""Side of an aerial tile, in metres."""
_MARGIN = 32.0  # metres around it, whose buildings may cast a shadow into it


def render_aerial(
    rng: np.random.Generator, world: World, at: Float[np.ndarray, "2"], size: int
) -> tuple[UInt8[np.ndarray, "size size 3"], UInt8[np.ndarray, "size size"]]:
    """RGB tile, north up, and class ids around `at` (metres east, south; on a corner of cells)."""
    photometry = sample_photometry(rng)
    view = cut_window(rng, world, at, TILE / 2 + _MARGIN, photometry)
    surface, crown = add_crowns(view)
    pad = round(_MARGIN / CELL)
    inner = (slice(pad, -pad), slice(pad, -pad))
    sunlight = trace_sunlight(surface, photometry.sun, CELL, _MARGIN)[inner]
    sunlight *= shade_slopes(surface[inner], photometry.sun, CELL) / photometry.sun[2]
    crown = crown[inner]
    paint = np.where(crown, view.crown[inner], view.paint[inner])
    colour = view.albedo[paint] * view.grain[inner][..., None]
    # Wind-screens slope: cells of a car beside a step between bonnet and cabin.
    step = np.abs(np.diff(view.top[inner], axis=0, prepend=0)) > 0.4
    step |= np.abs(np.diff(view.top[inner], axis=1, prepend=0)) > 0.4
    colour[step & (paint >= CARS) & (paint < BUILDINGS)] *= 0.55
    picture = develop(apply_light(colour, sunlight, photometry), photometry)
    ids = world.paints.classes[paint]
    ids[crown] = TREE
    return _resize(picture, size), np.asarray(
        Image.fromarray(ids).resize((size, size), Image.Resampling.NEAREST)
    )


def _resize(picture: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    kind = Image.Resampling.BOX if size <= len(picture) else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((size, size), kind))
