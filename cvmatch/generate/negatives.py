"""Which tile is it? InfoNCE of drawn tiles against the true ones, and a memory of more of these."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

_CELLS = 16
"""Cells a side at which pictures are told apart; finer ones would compare texture."""

_SHARPNESS = 10.0
"""Factor of a correlation (-1 to 1) as logit (reference/world.md, section 8)."""


class Known(NamedTuple):
    """True tiles of earlier steps, and which of them are rivals of a row: not its own tile."""

    luminance: Float[Tensor, "tile cell"]
    rival: Bool[Tensor, "batch tile"]


class Rivals(nn.Module):
    """The last true tiles: a batch of 32 has few from which to tell one of thousands.

    A cross-batch memory (Wang et al. 2020). Tiles are compared by their pixels, so none grows old.
    With 512, the rays' R@1 of 500 rose from 46 to 48 and R@1 % from 64 to 67 (toy, 300 CPU s).
    """

    luminance: Tensor
    keys: Tensor
    count: Tensor

    def __init__(self, tiles: int, size: int) -> None:
        """`size` is the side of the pictures that are compared, in cells."""
        super().__init__()
        self.size = min(_CELLS, size)
        self.register_buffer("luminance", torch.zeros(tiles, self.size**2))
        self.register_buffer("keys", torch.zeros(tiles, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def known(self, keys: Int64[Tensor, " batch"]) -> Known:
        """What is remembered, for rows of these keys."""
        filled = torch.arange(len(self.keys), device=keys.device) < self.count
        # A copy, since `remember` writes where the backward pass would look.
        return Known(self.luminance.clone(), filled & (self.keys != keys[:, None]))

    @torch.no_grad()
    def remember(
        self, keys: Int64[Tensor, " batch"], tile: Float[Tensor, "batch 3 height width"]
    ) -> None:
        """Keep true tiles, in place of the oldest ones."""
        kept = len(self.keys)
        self.luminance.copy_(torch.cat([_luminance(tile, self.size), self.luminance])[:kept])
        self.keys.copy_(torch.cat([keys, self.keys])[:kept])
        self.count.copy_((self.count + len(keys)).clamp(max=kept))


def told_apart(
    drawn: Float[Tensor, "batch 3 size size"],
    true: Float[Tensor, "batch 3 size size"],
    rows: Bool[Tensor, " batch"],
    known: Known | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE of `rows` over the batch by luminance correlation (NCC), both directions; 0 if none.

    Pictures are compared at 16 x 16 cells or fewer. Rows that are left out stay as rivals: the true
    tiles of all, the drawings of none. `known` tiles are rivals too.
    """
    size = min(_CELLS, drawn.shape[-1])
    seen = _SHARPNESS * _luminance(drawn, size)
    score = seen @ _luminance(true, size).T
    own = torch.arange(len(score), device=score.device)
    others = score.masked_fill(~rows[:, None], -torch.inf).T
    if known is not None:
        older = (seen @ known.luminance.T).masked_fill(~known.rival, -torch.inf)
        score = torch.cat([score, older], dim=1)
    across = F.cross_entropy(score, own, reduction="none")
    back = F.cross_entropy(others[rows], own[rows], reduction="none") if rows.any() else across[:0]
    return (across[rows].sum() + back.sum()) / (2 * rows.sum().clamp(min=1))


def _luminance(picture: Tensor, size: int) -> Tensor:
    """Luminance of `size` x `size` cells, less its mean, of length 1."""
    weights = picture.new_tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
    grey = F.adaptive_avg_pool2d((picture * weights).sum(dim=1), size).flatten(1)
    return F.normalize(grey - grey.mean(dim=1, keepdim=True), dim=1)
