"""What the generator is trained on: noise, the picture that its answer implies, and the map."""

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.generate.bev import Rays
from cvmatch.generate.encoders import Frozen
from cvmatch.generate.negatives import Known, told_apart
from cvmatch.generate.perceptual import Lpips
from cvmatch.generate.settings import Recipe


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
    rays: Rays,
    drawn: Float[Tensor, "batch channel size size"],
    tile: Float[Tensor, "batch 3 height width"],
    classes: UInt8[Tensor, "batch height width"],
    known: Known | None = None,
) -> dict[str, Tensor]:
    """What can be read off a map that `rays` drew: colours and classes of the tile.

    `map`: squared error of the colours in [-1, 1]; `contrast`: `told_apart` of all rows by them;
    `classes`: `class_term`. Rays in training also learn the mean colour of the tiles.
    """
    picture = rays.picture(drawn).float()
    true = F.adaptive_avg_pool2d(tile * 2 - 1, picture.shape[-1])
    rays.follow(true)
    everyone = torch.ones(len(true), dtype=torch.bool, device=true.device)
    return {
        "map": F.mse_loss(picture, true),
        "contrast": told_apart(picture, true, everyone, known),
        "classes": class_term(rays.classes(drawn).float(), classes),
    }


def class_term(
    logits: Float[Tensor, "batch kind size size"], classes: UInt8[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Cross-entropy of each cell's shares of the classes, mean over the pixels that have one.

    Pixels of no class, such as those of a row without a class map, are ignored; 0 if all are.
    """
    named = torch.stack([classes == kind for kind in range(logits.shape[1])], dim=1)
    shares = F.adaptive_avg_pool2d(named.float(), logits.shape[-1])
    error = -(shares * F.log_softmax(logits, dim=1)).sum()
    return error / shares.sum().clamp(min=1)


def identify_terms(
    colours: nn.Conv2d,
    latent: Float[Tensor, "batch c h w"],
    clean: Float[Tensor, "batch c h w"],
    tile: Float[Tensor, "batch 3 height width"],
    rows: Bool[Tensor, " batch"],
    known: Known | None = None,
) -> dict[str, Tensor]:
    """`identify`: `told_apart` of the predicted latents (`clean`), by colours read off them.

    `read`: squared error of that reading on the true latents, from which alone it learns: no
    prediction can please it. A tile's colours are 95 % a linear function of its latent (toy).
    """
    true = F.adaptive_avg_pool2d(tile * 2 - 1, latent.shape[-1])
    weight, bias = colours.weight.detach(), colours.bias
    drawn = F.conv2d(clean, weight, bias if bias is None else bias.detach(), padding=1)
    identify = told_apart(drawn, true, rows, known)
    return {"read": F.mse_loss(colours(latent), true), "identify": identify}


def total(recipe: Recipe, named: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the terms; one without a weight of its own counts once."""
    return torch.stack([getattr(recipe, f"w_{n}", 1.0) * v for n, v in named.items()]).sum()
