"""Pairs turned and mirrored as a whole: the augmentation that stored encodings can keep."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from cvmatch.data import geometry
from cvmatch.generate.settings import Recipe
from cvmatch.nn import rng


def count(turns: bool, mirror: bool) -> int:
    """Number of variants; variant v is turned by v modulo 4 (or 1) quarters, then mirrored."""
    return (4 if turns else 1) * (2 if mirror else 1)


def change(
    variant: Int64[Tensor, " row"], turns: bool
) -> tuple[Int64[Tensor, " row"], Bool[Tensor, " row"]]:
    """Quarter turns and mirror of variants, for `geometry.rotate90_tile`."""
    quarters = 4 if turns else 1
    return variant % quarters, variant >= quarters


class Pairs(NamedTuple):
    """A batch of pairs in one variant of each."""

    ground: Float[Tensor, "row 3 height width"]
    """Panoramas, in [0, 1]."""
    tile: Float[Tensor, "row 3 size size"]
    """Tiles, in [0, 1]."""
    classes: UInt8[Tensor, "row size size"]
    """Class ids of the tiles, schema.IGNORE where unknown."""
    variant: Int64[Tensor, " row"]
    """Which variant."""


def pairs_of(batch: dict[str, Tensor]) -> Pairs:
    """The pairs of a batch as they are."""
    ground, tile = batch["ground"].float() / 255, batch["aerial"].float() / 255
    return Pairs(ground, tile, batch["classes"], torch.zeros_like(batch["key"]))


def varied(batch: dict[str, Tensor], recipe: Recipe, seed: int) -> Pairs:
    """Its pairs turned and mirrored by a draw of each row and epoch.

    Where the batch has `mirrored` (`encode`), mirrored pairs take their panorama from there.
    """
    plain, number = pairs_of(batch), count(recipe.turns, recipe.mirror)
    stream = rng.fold_in(seed, int(batch["epoch"]), "variant")
    chosen = (rng.uniform(batch["key"], stream) * number).long()
    how = change(chosen, recipe.turns)
    if "mirrored" in batch:
        ground = _turned_views(plain.ground, batch["mirrored"].float() / 255, *how)
    else:
        ground = geometry.rotate90_panorama(plain.ground, *how)
    return Pairs(
        ground,
        geometry.rotate90_tile(plain.tile, *how),
        geometry.rotate90_tile(plain.classes, *how),
        chosen,
    )


def _turned_views(
    view: Float[Tensor, "row 3 height width"],
    mirrored: Float[Tensor, "row 3 height width"],
    turns: Int64[Tensor, " row"],
    mirror: Bool[Tensor, " row"],
) -> Float[Tensor, "row 3 height width"]:
    """Views of turned panoramas, from those of the panoramas and of the mirrored ones.

    A view's column is the mean of those of a panorama from its own azimuth on; mirrored, it would
    be of those before. It may be turned: its quarters are a panorama's.
    """
    ground = torch.where(mirror[:, None, None, None], mirrored, view)
    # After mirroring, a turn goes the other way.
    turns = torch.where(mirror, -turns, turns)
    return geometry.rotate90_panorama(ground, turns, torch.zeros_like(mirror))
