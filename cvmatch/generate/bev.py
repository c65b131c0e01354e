"""Panorama -> north-up map: each column becomes values along its ray, and the rays are laid out."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.data import geometry, schema

HEIGHT, WIDTH = 64, 256
"""Pixels of the panorama that the network looks at; `view` averages larger ones down to it."""

CLASSES = len(schema.PALETTE)
"""Classes of the map that `Rays.classes` reads."""

BINS = 16
"""Values along a ray, from the tile's inscribed circle (first) to the camera (last)."""

_STEM = ((5, 2, 32), (3, 2, 48), (3, 1, 72), (3, 1, 112))
"""Kernel, stride along the azimuth (it is 2 along the height) and channels of the convolutions."""

_WIDTH = 256
"""Channels of the convolutions along the azimuth."""

_VIVID = 1.4
"""How much farther from the mean colour than `picture` a tile is taken to be: a regression answers
palely. Two toy generators whose A is pulled to it (`coarse.py`), each on its 500 held-out tiles:
Frechet distance by the toy CLIP 2.7 and 3.2 with 1, 2.2 and 2.5 with 1.25, 2.0 and 2.3 with 1.4;
the true tile among the first tenth in 92.4 and 90.2, 92.0 and 89.8, 92.0 and 89.8 %."""

_KEPT = 0.95
"""Of the mean colour, in a step of training."""

_DROPOUT = 0.1
"""Share of the last features that training drops. With the panorama's light changed (`RaysTask`),
300 CPU seconds on 2,000 pairs no longer overfit: R@10 % of 500 by the drawn tile 87 before, 92."""


class Round(nn.Module):
    """A convolution whose columns wrap, so that south has no seam, then GroupNorm and SiLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.wrap = kernel[1] // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel[0] // 2, 0))
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d k v"]:
        """One convolution of a picture whose last axis is the azimuth."""
        return F.silu(self.norm(self.conv(F.pad(x, (self.wrap, self.wrap, 0, 0), "circular"))))


class Rays(nn.Module):
    """Map of `channels` values for each cell of the tile, from the panorama alone (0.9 M weights).

    Every step commutes with turning the panorama, so the map of a turned panorama is the turned map
    (exactly, for quarter turns). `picture` reads the tile's colours off the map with one 1 x 1
    convolution: what makes the map informative before the diffusion model can use it (R@1 26 to 50
    of 500 after 150 CPU seconds, reference/world.md section 8). `classes` reads its class map
    (logits), since a roof may have any colour.
    """

    mean: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for kernel, stride, outputs in _STEM:
            layers.append(Round(inputs, outputs, (kernel, kernel), (2, stride)))
            inputs = outputs
        self.stem = nn.Sequential(*layers)
        self.enter = nn.Conv2d(inputs * HEIGHT // 2 ** len(_STEM), _WIDTH, 1)
        self.along = nn.ModuleList(Round(_WIDTH, _WIDTH, (1, 5)) for _ in range(2))
        self.leave = nn.Conv2d(_WIDTH, channels * BINS, 1)
        self.picture = nn.Conv2d(channels, 3, 1)
        self.classes = nn.Conv2d(channels, CLASSES, 1)
        self.register_buffer("mean", torch.zeros(3))

    def forward(
        self, view: Float[Tensor, "batch 3 64 256"], size: int
    ) -> Float[Tensor, "batch channel {size} {size}"]:
        """North-up map of `view`s, `size` cells a side over the tile's extent."""
        x = self.stem(view * 2 - 1).flatten(1, 2)[:, :, None]
        x = F.silu(self.enter(x))
        for layer in self.along:
            x = x + layer(x)
        x = F.dropout(x, _DROPOUT, self.training)
        rays = self.leave(x)[:, :, 0].unflatten(1, (-1, BINS))
        return geometry.polar_to_cartesian(rays, size)

    @torch.no_grad()
    def follow(self, true: Float[Tensor, "batch 3 size size"]) -> None:
        """Learn the mean colour of tiles in [-1, 1], in training."""
        if self.training:
            self.mean.lerp_(true.mean(dim=(0, 2, 3)), 1 - _KEPT)

    def drawing(
        self, drawn: Float[Tensor, "batch channel size size"]
    ) -> Float[Tensor, "batch 3 size size"]:
        """Colours of a map, about as vivid as a tile's, in [0, 1] and somewhat beyond."""
        mean = self.mean[:, None, None]
        return (mean + _VIVID * (self.picture(drawn).float() - mean)) / 2 + 0.5


def view(panorama: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 64 256"]:
    """RGB panoramas in [0, 1] at the size that `Rays` takes."""
    if panorama.shape[-2:] == (HEIGHT, WIDTH):
        return panorama
    return F.interpolate(panorama, (HEIGHT, WIDTH), mode="area")


def angles(
    azimuth: Float[Tensor, " token"], harmonics: int
) -> Float[Tensor, "token 2*{harmonics}"]:
    """Sine and cosine of the first multiples of an azimuth in radians, clockwise from north."""
    multiples = azimuth[:, None] * torch.arange(1, harmonics + 1)
    return torch.cat([torch.sin(multiples), torch.cos(multiples)], dim=-1)


def token_places(
    height: int, width: int, crops: int, patch: int
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Azimuth (radians, clockwise from north) and elevation of the tokens of all azimuth crops.

    Elevation is the row, 1 at the panorama's top edge and -1 at its bottom. Order as CLIP's: for
    each crop its class token, which stands at the crop's centre, then the patches row by row.
    """
    side = height // patch
    centre = (torch.arange(side) + 0.5) * patch
    row, column = torch.meshgrid(centre, centre, indexing="ij")
    middle = torch.tensor([height / 2])
    row, column = torch.cat([middle, row.flatten()]), torch.cat([middle, column.flatten()])
    starts = torch.tensor(geometry.crop_starts(width, height, crops))
    azimuth = ((starts[:, None] + column) / width * 2 * math.pi - math.pi).flatten()
    return azimuth, (1 - 2 * row / height).repeat(crops)
