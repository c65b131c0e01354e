"""Changes of a pair that keep its geometry: panorama, tile, synthetic aerial and class map at once.

All choices are draws of (row key, epoch), so that workers, batches and restarts do not matter.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from cvmatch import draws, geometry
from cvmatch.colour import jittered


class Views(NamedTuple):
    """What the towers see of a batch of pairs."""

    ground: Float[Tensor, "row 3 h w"]
    """G, in [0, 1]."""
    aerial: Float[Tensor, "row 3 s s"]
    """C, in [0, 1]."""
    synthetic: Float[Tensor, "row 3 s s"]
    """A, in [0, 1]."""
    classes: UInt8[Tensor, "row s s"]
    """S, ids."""


def augmented(views: Views, key: Int64[Tensor, " row"], seed: int, epoch: int) -> Views:
    """Turn and mirror each pair as a whole, and shift the colours of G, C and A independently."""
    quarter = draws.uniform(key, draws.stream(seed, epoch, "turn"))
    mirror = draws.uniform(key, draws.stream(seed, epoch, "mirror")) < 0.5
    ground, aerial, synthetic, classes = turned(views, (quarter * 4).long(), mirror)
    return Views(
        jittered(ground, key, draws.stream(seed, epoch, "colour of ground")),
        jittered(aerial, key, draws.stream(seed, epoch, "colour of aerial")),
        jittered(synthetic, key, draws.stream(seed, epoch, "colour of synthetic")),
        classes,
    )


def turned(views: Views, turns: Int64[Tensor, " row"], mirror: Bool[Tensor, " row"]) -> Views:
    """Each row's maps by `turns` quarters counter-clockwise, then east and west exchanged.

    The panorama with them (`geometry.turned_panorama`).
    """
    return Views(
        geometry.turned_panorama(views.ground, turns, mirror),
        *(geometry.turned_tile(tile, turns, mirror) for tile in views[1:]),
    )
