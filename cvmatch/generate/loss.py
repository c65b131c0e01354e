"""What the generator is trained on: noise, the picture that its answer implies, and the map."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.generate.frozen import Frozen
from cvmatch.generate.perceptual import Lpips

_IDENTIFY = 16
"""Cells a side at which pictures are told apart; finer ones would compare texture."""

_SHARPNESS = 10.0
"""Factor of a correlation (-1 to 1) as logit (reference/world.md, section 8)."""


def image_rows(
    signal: Float[Tensor, " batch"], draw: Float[Tensor, " batch"], rows: int, least: float
) -> tuple[Int64[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """Which `rows` the image terms look at, and with which weight: `signal`, or 0 below `least`.

    `draw` in [0, 1) puts the rows in order, so the choice is random and the same on every run.
    x0_hat of a row with little signal is a guess at the mean picture, which says nothing of A.
    """
    meaningful = signal >= least
    chosen = (draw + ~meaningful).argsort()[:rows]
    return chosen, (signal * meaningful)[chosen]


def image_terms(
    frozen: Frozen,
    perceptual: Lpips | None,
    clean: Float[Tensor, "row c h w"],
    tile: Float[Tensor, "row 3 height width"],
    strength: Float[Tensor, " row"],
) -> dict[str, Tensor]:
    """`clip` and `vae` (LPIPS) between decoded x0_hat and the true tile, weighted means over rows.

    Without `perceptual` only `clip`. Gradient flows through the frozen networks into `clean`.
    """
    picture = frozen.decode(clean)
    with torch.no_grad():
        true = frozen.embed(tile)
    distances = {"clip": 1 - F.cosine_similarity(frozen.embed(picture), true).float()}
    if perceptual is not None:
        distances["vae"] = perceptual(picture, tile).float()
    return {name: (strength * value).mean() for name, value in distances.items()}


def map_terms(
    drawn: Float[Tensor, "batch 3 size size"], tile: Float[Tensor, "batch 3 height width"]
) -> dict[str, Tensor]:
    """`map`: squared error of the drawn tile in [-1, 1]; `contrast`: InfoNCE over the batch.

    Scores of the latter are luminance correlations (NCC) of drawn with true tiles; both directions.
    """
    true = F.adaptive_avg_pool2d(tile * 2 - 1, drawn.shape[-1])
    everyone = torch.ones(len(true), dtype=torch.bool, device=true.device)
    contrast = told_apart(drawn.float(), true, everyone)
    return {"map": F.mse_loss(drawn.float(), true), "contrast": contrast}


def identify_terms(
    colours: nn.Conv2d,
    latent: Float[Tensor, "batch c h w"],
    clean: Float[Tensor, "batch c h w"],
    tile: Float[Tensor, "batch 3 height width"],
    rows: Bool[Tensor, " batch"],
) -> dict[str, Tensor]:
    """`identify`: InfoNCE of the predicted latents (`clean`) of `rows`, by colours read off them.

    `read`: squared error of that reading on the true latents, from which alone it learns: no
    prediction can please it. A tile's colours are 90 % a linear function of its latent.
    """
    true = F.adaptive_avg_pool2d(tile * 2 - 1, latent.shape[-1])
    weight, bias = colours.weight.detach(), colours.bias
    drawn = F.conv2d(clean, weight, bias if bias is None else bias.detach(), padding=1)
    return {"read": F.mse_loss(colours(latent), true), "identify": told_apart(drawn, true, rows)}


def told_apart(
    drawn: Float[Tensor, "batch 3 size size"],
    true: Float[Tensor, "batch 3 size size"],
    rows: Bool[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """InfoNCE of `rows` over the batch by luminance correlation (NCC), both directions; 0 if none.

    Rows that are left out stay as rivals: the true tiles of all, the drawings of none.
    """
    score = _SHARPNESS * correlation(drawn, true)
    own = torch.arange(len(score), device=score.device)
    across = F.cross_entropy(score, own, reduction="none")
    others = score.masked_fill(~rows[:, None], -torch.inf).T
    back = F.cross_entropy(others[rows], own[rows], reduction="none") if rows.any() else across[:0]
    return (across[rows].sum() + back.sum()) / (2 * rows.sum().clamp(min=1))


def correlation(
    first: Float[Tensor, "row 3 h w"], second: Float[Tensor, "column 3 h w"]
) -> Float[Tensor, "row column"]:
    """Luminance correlation in [-1, 1] of each picture with each, at 16 x 16 cells or fewer."""
    size = min(_IDENTIFY, first.shape[-1])
    return _standard(first, size) @ _standard(second, size).T


def _standard(picture: Tensor, size: int) -> Tensor:
    weights = picture.new_tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
    grey = F.adaptive_avg_pool2d((picture * weights).sum(dim=1), size).flatten(1)
    return F.normalize(grey - grey.mean(dim=1, keepdim=True), dim=1)
