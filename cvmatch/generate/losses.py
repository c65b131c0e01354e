"""The generator's losses: CLIP and LPIPS of the decoded x0, BEV read-outs, and InfoNCE of tiles."""

import os
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.generate.conditioning import PolarToBEV
from cvmatch.generate.encoders import FrozenEncoders
from cvmatch.generate.settings import GeneratorLossConfig
from cvmatch.nn import backbones
from cvmatch.runtime import internals

_NCE_CELLS = 16
"""Cells a side at which InfoNCE compares images; finer ones would compare texture."""

_INVERSE_TEMPERATURE = 10.0
"""Factor of a correlation (-1 to 1) as logit."""

_VGG16 = [64, 128, 256, 512, 512]
"""Channels of VGG16's stages."""


def weighted_sum(config: GeneratorLossConfig, terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of the terms by their weights; one without a weight counts once."""
    weighted = [getattr(config, f"{name}_weight", 1.0) * value for name, value in terms.items()]
    return torch.stack(weighted).sum()


def select_rows(
    alphas_cumprod: Float[Tensor, " batch"],
    order: Float[Tensor, " batch"],
    rows: int,
    min_signal: float,
) -> tuple[Int64[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """Choose the rows that the image losses see, and their weights.

    x0 predicted from little signal is a guess at the mean image, which says nothing of A.

    Args:
        alphas_cumprod: share of signal, in variance, of the noisy latents.
        order: numbers in [0, 1) by whose order rows are chosen.
        rows: how many.
        min_signal: rows of less signal have the weight 0; the others have their signal.
    """
    enough = alphas_cumprod >= min_signal
    chosen = (order + ~enough).argsort()[:rows]
    return chosen, (alphas_cumprod * enough)[chosen]


def image_losses(
    encoders: FrozenEncoders,
    lpips: "LPIPS | None",
    x0: Float[Tensor, "row c h w"],
    tile: Float[Tensor, "row 3 height width"],
    weight: Float[Tensor, " row"],
) -> dict[str, Tensor]:
    """Return `clip` and `lpips` of decoded x0 and the true tile, weighted means over rows.

    Without `lpips` only `clip`. Gradient flows through the frozen networks into `x0`.
    """
    image = encoders.decode(x0)
    with torch.no_grad():
        true = encoders.embed_image(tile)
    distances = {"clip": 1 - F.cosine_similarity(encoders.embed_image(image), true).float()}
    if lpips is not None:
        distances["lpips"] = lpips(image, tile).float()
    return {name: (weight * value).mean() for name, value in distances.items()}


def bev_losses(
    network: PolarToBEV,
    bev: Float[Tensor, "batch channel size size"],
    tile: Float[Tensor, "batch 3 height width"],
    mask: UInt8[Tensor, "batch height width"],
    negatives: "Negatives | None" = None,
) -> dict[str, Tensor]:
    """Return the losses of what is read off a BEV map: the tile's colours and classes.

    `bev`: squared error of the colours in [-1, 1]; `bev_nce`: `tile_info_nce` of all rows by them;
    `bev_class`: `class_loss`. In training `network` also follows the mean colour of the tiles.
    """
    rgb = network.to_rgb(bev).float()
    true = F.adaptive_avg_pool2d(tile * 2 - 1, rgb.shape[-1])
    network.update_mean(true)
    rows = torch.ones(len(true), dtype=torch.bool, device=true.device)
    return {
        "bev": F.mse_loss(rgb, true),
        "bev_nce": tile_info_nce(rgb, true, rows, negatives),
        "bev_class": class_loss(network.to_classes(bev).float(), mask),
    }


def class_loss(
    logits: Float[Tensor, "batch kind size size"], mask: UInt8[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy of each cell's shares of the classes, mean over labelled pixels.

    Pixels of no class, such as those of a row without a class map, are ignored; 0 if all are.
    """
    one_hot = torch.stack([mask == kind for kind in range(logits.shape[1])], dim=1)
    shares = F.adaptive_avg_pool2d(one_hot.float(), logits.shape[-1])
    error = -(shares * F.log_softmax(logits, dim=1)).sum()
    return error / shares.sum().clamp(min=1)


def x0_nce_losses(
    to_rgb: nn.Conv2d,
    latent: Float[Tensor, "batch c h w"],
    x0: Float[Tensor, "batch c h w"],
    tile: Float[Tensor, "batch 3 height width"],
    rows: Bool[Tensor, " batch"],
    negatives: "Negatives | None" = None,
) -> dict[str, Tensor]:
    """Return `x0_nce`, the `tile_info_nce` of predicted latents by colours read off them.

    `readout`: squared error of that reading on the true latents. The readout is trained on these
    only, so the UNet cannot game it (docs/decisions.md#colour-readout).
    """
    true = F.adaptive_avg_pool2d(tile * 2 - 1, latent.shape[-1])
    weight, bias = to_rgb.weight.detach(), to_rgb.bias
    rgb = F.conv2d(x0, weight, bias if bias is None else bias.detach(), padding=1)
    x0_nce = tile_info_nce(rgb, true, rows, negatives)
    return {"readout": F.mse_loss(to_rgb(latent), true), "x0_nce": x0_nce}


class Negatives(NamedTuple):
    """True tiles of earlier steps, as negatives of a batch."""

    luminance: Float[Tensor, "tile cell"]
    valid: Bool[Tensor, "batch tile"]
    """Which tiles are negatives of a row: not its own one."""


class NegativeQueue(nn.Module):
    """The last true tiles, as more negatives: a cross-batch memory (Wang et al. 2020).

    Tiles are compared by their pixels, so none grows old (docs/decisions.md#negative-queue).
    """

    luminance: Tensor
    keys: Tensor
    count: Tensor

    def __init__(self, size: int, tiles: int = 512) -> None:
        """Hold `tiles` tiles; `size` is the side of the images that are compared, in cells."""
        super().__init__()
        self.size = min(_NCE_CELLS, size)
        self.register_buffer("luminance", torch.zeros(tiles, self.size**2))
        self.register_buffer("keys", torch.zeros(tiles, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def negatives(self, keys: Int64[Tensor, " batch"]) -> Negatives:
        """Return the tiles of the queue for rows of these keys."""
        filled = torch.arange(len(self.keys), device=keys.device) < self.count
        # A copy, since `enqueue` writes where the backward pass would look.
        return Negatives(self.luminance.clone(), filled & (self.keys != keys[:, None]))

    @torch.no_grad()
    def enqueue(
        self, keys: Int64[Tensor, " batch"], tile: Float[Tensor, "batch 3 height width"]
    ) -> None:
        """Add true tiles, in place of the oldest ones."""
        size = len(self.keys)
        self.luminance.copy_(torch.cat([_luminance(tile, self.size), self.luminance])[:size])
        self.keys.copy_(torch.cat([keys, self.keys])[:size])
        self.count.copy_((self.count + len(keys)).clamp(max=size))


def tile_info_nce(
    predicted: Float[Tensor, "batch 3 size size"],
    true: Float[Tensor, "batch 3 size size"],
    rows: Bool[Tensor, " batch"],
    negatives: Negatives | None = None,
) -> Float[Tensor, ""]:
    """Return the symmetric InfoNCE of `rows` by luminance correlation (NCC); 0 without rows.

    Images are compared at 16 x 16 cells or fewer. Of rows that are left out, the true tiles stay as
    negatives. So are `negatives`.
    """
    size = min(_NCE_CELLS, predicted.shape[-1])
    query = _INVERSE_TEMPERATURE * _luminance(predicted, size)
    score = query @ _luminance(true, size).T
    label = torch.arange(len(score), device=score.device)
    by_tile = score.masked_fill(~rows[:, None], -torch.inf).T
    if negatives is not None:
        queued = (query @ negatives.luminance.T).masked_fill(~negatives.valid, -torch.inf)
        score = torch.cat([score, queued], dim=1)
    across = F.cross_entropy(score, label, reduction="none")
    back = across[:0]
    if rows.any():
        back = F.cross_entropy(by_tile[rows], label[rows], reduction="none")
    return (across[rows].sum() + back.sum()) / (2 * rows.sum().clamp(min=1))


class LPIPS(nn.Module):
    """Distance of two images in the features of a frozen VGG (Zhang et al. 2018).

    Weighted squared difference of unit-norm features, mean over pixels, sum over stages. Features
    are taken in front of each max pooling (relu1_2 ... relu5_3 of VGG16).
    """

    def __init__(self, features: nn.Sequential, weights: list[Tensor] | None = None) -> None:
        """`weights` has one number a channel for each stage; None is 1 for all."""
        super().__init__()
        self.stages = nn.ModuleList(_split_stages(features))
        widths = [_stage_width(stage) for stage in self.stages]
        weights = weights or [torch.ones(width) for width in widths]
        if [len(weight) for weight in weights] != widths:
            raise ValueError(
                f"LPIPS: expected weights for stages of {widths} channels, got "
                f"{[len(weight) for weight in weights]}."
            )
        for index, weight in enumerate(weights):
            self.register_buffer(f"weight{index}", weight.clone())
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, name: str) -> "LPIPS":
        """Load VGG16 with the published linear weights, or a tower directory with unit ones.

        `name` is vgg16 (of torchvision's hub), a file of its weights, or such a directory.
        """
        network = ("vgg16", name) if os.path.isfile(name) else (name, "")
        features = backbones.load_vgg_features(*network)
        published = [_stage_width(stage) for stage in _split_stages(features)] == _VGG16
        return cls(features, load_lpips_weights() if published else None)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode: batch norms and dropout of a frozen network do not move."""
        del mode
        return super().train(False)

    def forward(
        self, first: Float[Tensor, "batch 3 h w"], second: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, " batch"]:
        """Return the distance of RGB images in [0, 1]: 0 if equal, about 0.7 if unrelated."""
        x = backbones.normalise(torch.cat([first, second]))
        total = first.new_zeros(len(first))
        for index, stage in enumerate(self.stages):
            x = stage(x)
            unit = x / torch.sqrt(1e-8 + (x**2).sum(dim=1, keepdim=True))
            a, b = unit.chunk(2)
            weight = self.get_buffer(f"weight{index}")[:, None, None]
            total = total + (weight * (a - b) ** 2).sum(dim=1).mean(dim=(1, 2))
        return total


def load_lpips_weights() -> list[Tensor]:
    """Return the linear weights of LPIPS for VGG16, from the file that torchmetrics ships."""
    state = torch.load(internals.lpips_weights_file(), map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"].flatten() for index in range(len(_VGG16))]


def _split_stages(features: nn.Sequential) -> list[nn.Sequential]:
    """Cut the stack in front of each max pooling; what follows the last pooling is not used."""
    stages, layers = [], []
    for layer in features:
        if isinstance(layer, nn.MaxPool2d) and layers:
            stages.append(nn.Sequential(*layers))
            layers = []
        layers.append(layer)
    if not stages:
        raise ValueError("LPIPS: expected a VGG stack with max poolings, got none.")
    return stages


def _stage_width(stage: nn.Module) -> int:
    return [layer.out_channels for layer in stage.modules() if isinstance(layer, nn.Conv2d)][-1]


def _luminance(image: Tensor, size: int) -> Tensor:
    """Return the luminance of `size` x `size` cells, less its mean, of length 1."""
    weights = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
    grey = F.adaptive_avg_pool2d((image * weights).sum(dim=1), size).flatten(1)
    return F.normalize(grey - grey.mean(dim=1, keepdim=True), dim=1)
