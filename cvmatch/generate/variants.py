"""Pairs turned and mirrored as a whole: the augmentation that stored encodings can keep."""

from jaxtyping import Bool, Int64
from torch import Tensor

from cvmatch import draws, geometry
from cvmatch.generate.recipe import Recipe


def count(turns: bool, mirror: bool) -> int:
    """Number of variants; variant v is turned by v modulo 4 (or 1) quarters, then mirrored."""
    return (4 if turns else 1) * (2 if mirror else 1)


def change(
    variant: Int64[Tensor, " row"], turns: bool
) -> tuple[Int64[Tensor, " row"], Bool[Tensor, " row"]]:
    """Quarter turns and mirror of variants, for `geometry.turned_tile`."""
    quarters = 4 if turns else 1
    return variant % quarters, variant >= quarters


def varied(
    ground: Tensor, tile: Tensor, batch: dict[str, Tensor], recipe: Recipe, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs turned and mirrored by a draw of each row and epoch; and the variants drawn."""
    number = count(recipe.turns, recipe.mirror)
    stream = draws.stream(seed, int(batch["epoch"]), "variant")
    chosen = (draws.uniform(batch["key"], stream) * number).long()
    how = change(chosen, recipe.turns)
    return geometry.turned_panorama(ground, *how), geometry.turned_tile(tile, *how), chosen
