"""LPIPS: the distance of two pictures in the features of a VGG (Zhang et al. 2018)."""

import os

import torch
import torchmetrics
from jaxtyping import Float
from torch import Tensor, nn

from cvmatch.nn import backbones

_VGG16 = [64, 128, 256, 512, 512]


class Lpips(nn.Module):
    """Weighted squared difference of unit-norm features, mean over pixels, sum over stages.

    Features are taken in front of each max pooling (relu1_2 ... relu5_3 of VGG16). Frozen; gradient
    flows into the pictures.
    """

    def __init__(self, features: nn.Sequential, weights: list[Tensor] | None = None) -> None:
        """`weights` has one number a channel for each stage; None is 1 for all."""
        super().__init__()
        self.stages = nn.ModuleList(_stages(features))
        widths = [_width(stage) for stage in self.stages]
        given = weights or [torch.ones(width) for width in widths]
        if [len(weight) for weight in given] != widths:
            raise ValueError(
                f"LPIPS: stages have {widths} channels, got weights for "
                f"{[len(weight) for weight in given]}"
            )
        for index, weight in enumerate(given):
            self.register_buffer(f"weight{index}", weight.clone())
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, name: str, weights: str = "") -> "Lpips":
        """From VGG16 with the published linear weights, or from a tower directory with unit ones.

        `name` and `weights` as in `towers.tower`.
        """
        features = backbones.load_vgg_features(name, weights)
        published = [_width(stage) for stage in _stages(features)] == _VGG16
        return cls(features, published_weights() if published else None)

    def train(self, mode: bool = True) -> "Lpips":
        """Stay in evaluation mode: batch norms and dropout of a frozen network do not move."""
        del mode
        return super().train(False)

    def forward(
        self, first: Float[Tensor, "batch 3 h w"], second: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, " batch"]:
        """Distance of RGB pictures in [0, 1]; 0 for equal ones, 0.7 or so for unrelated ones."""
        x = backbones.normalise(torch.cat([first, second]))
        total = first.new_zeros(len(first))
        for index, stage in enumerate(self.stages):
            x = stage(x)
            unit = x / torch.sqrt(1e-8 + (x**2).sum(dim=1, keepdim=True))
            one, other = unit.chunk(2)
            weight = self.get_buffer(f"weight{index}")[:, None, None]
            total = total + (weight * (one - other) ** 2).sum(dim=1).mean(dim=(1, 2))
        return total


def published_weights() -> list[Tensor]:
    """The linear weights of LPIPS for VGG16, from the file that torchmetrics ships."""
    folder = os.path.join(os.path.dirname(torchmetrics.__file__), "functional/image/lpips_models")
    state = torch.load(os.path.join(folder, "vgg.pth"), map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"].flatten() for index in range(len(_VGG16))]


def _stages(features: nn.Sequential) -> list[nn.Sequential]:
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


def _width(stage: nn.Module) -> int:
    return [layer.out_channels for layer in stage.modules() if isinstance(layer, nn.Conv2d)][-1]
