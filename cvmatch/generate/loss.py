"""What the generator is trained on: noise, the picture that its answer implies, and the map."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cvmatch.generate.model import Generator
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
    generator: Generator,
    perceptual: Lpips | None,
    clean: Float[Tensor, "row c h w"],
    tile: Float[Tensor, "row 3 height width"],
    strength: Float[Tensor, " row"],
) -> dict[str, Tensor]:
    """`clip` and `vae` (LPIPS) between decoded x0_hat and the true tile, weighted means over rows.

    Without `perceptual` only `clip`. Gradient flows through the frozen networks into `clean`.
    """
    picture = generator.decode(clean)
    with torch.no_grad():
        true = generator.embed(tile)
    distances = {"clip": 1 - F.cosine_similarity(generator.embed(picture), true).float()}
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
    score = _SHARPNESS * correlation(drawn.float(), true)
    own = torch.arange(len(score), device=score.device)
    contrast = (F.cross_entropy(score, own) + F.cross_entropy(score.T, own)) / 2
    return {"map": F.mse_loss(drawn.float(), true), "contrast": contrast}


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
