"""Changes of a pair that keep its geometry: panorama, tile, synthetic aerial and class map at once.

All choices are draws of (row key, epoch), so that workers, batches and restarts do not matter.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from cvmatch import draws

BRIGHTNESS = 0.2
"""Largest change of a view's brightness, as a share."""

CONTRAST = 0.2
"""Largest change of its contrast, as a share."""

TINT = 0.1
"""Largest change of each colour channel, as a share."""


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

    The panorama rolls and reverses with them. Reversing keeps column 0, which looks south in both
    (column j becomes column -j), so the polar view of the result is the result of the polar view.
    """
    return Views(
        _turned_panorama(views.ground, turns, mirror),
        *(_turned_map(tile, turns, mirror) for tile in views[1:]),
    )


def jittered(
    picture: Float[Tensor, "row 3 h w"], key: Int64[Tensor, " row"], stream: int
) -> Float[Tensor, "row 3 h w"]:
    """Other brightness, contrast and tint for each row; stays in [0, 1]."""
    change = 2 * draws.uniform(key, stream, 5)[..., None, None] - 1
    mean = picture.mean(dim=(1, 2, 3), keepdim=True)
    contrast = (picture - mean) * (1 + CONTRAST * change[:, 3:4]) + mean
    gain = (1 + BRIGHTNESS * change[:, 4:5]) * (1 + TINT * change[:, :3])
    return (contrast * gain).clamp(0, 1)


def _turned_panorama(ground: Tensor, turns: Tensor, mirror: Tensor) -> Tensor:
    width = ground.shape[-1]
    column = torch.arange(width, device=ground.device)[None]
    column = torch.where(mirror[:, None], -column, column) + turns[:, None] * (width // 4)
    index = (column % width)[:, None, None].expand(-1, *ground.shape[1:3], -1)
    return ground.gather(-1, index)


def _turned_map(tile: Tensor, turns: Tensor, mirror: Tensor) -> Tensor:
    rows = (-1,) + (1,) * (tile.ndim - 1)
    tile = torch.where((turns % 2 == 1).view(rows), tile.rot90(1, (-2, -1)), tile)
    tile = torch.where((turns >= 2).view(rows), tile.rot90(2, (-2, -1)), tile)
    return torch.where(mirror.view(rows), tile.flip(-1), tile)
