"""The trained part of conditioning: panorama features -> UNet tokens and a bird's-eye-view map."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.data import schema
from cvmatch.nn import geometry

BEV_VIEW = (64, 256)
"""Height and width, in pixels, of the panorama in the BEV network."""

BEV_CLASSES = len(schema.PALETTE)
"""Classes that are read off the BEV map."""

RADIAL_BINS = 16
"""Values along a ray, from the tile's inscribed circle (first) to the camera (last)."""

_HARMONICS = 4
"""Multiples of a token's azimuth whose sine and cosine are its position."""

_STEM = ((5, 2, 32), (3, 2, 48), (3, 1, 72), (3, 1, 112))
"""Kernel, stride along the azimuth (it is 2 along the height) and channels of the convolutions."""

_WIDTH = 256
"""Channels of the convolutions along the azimuth."""

_SATURATION_GAIN = 1.4
"""Regressed colours are paler than real ones (docs/decisions.md#saturation-gain)."""

_MEAN_DECAY = 0.95
"""EMA decay, a step, of the mean tile colour."""

_DROPOUT = 0.1
"""Share of the last features that training drops (docs/decisions.md#bev-regularisation)."""


class PanoramaFeatures(NamedTuple):
    """What the frozen encoders see of a panorama: the same in every epoch, so it is cached."""

    clip_tokens: Float[Tensor, "batch token state"]
    """CLIP's last hidden states of all azimuth crops."""
    view: Float[Tensor, "batch 3 rows columns"]
    """The panorama at the size BEV_VIEW, in [0, 1]."""


class Condition(NamedTuple):
    """What one UNet call is conditioned on."""

    tokens: Float[Tensor, "batch token width"]
    """For the cross-attention."""
    bev: Float[Tensor, "batch channel size size"]
    """North-up map, joined to the noisy latents."""

    def roll(self) -> "Condition":
        """Return the condition of each row's neighbour: a UNet that ignores it sees no change."""
        return Condition(self.tokens.roll(1, 0), self.bev.roll(1, 0))


class CircularConv2d(nn.Module):
    """A convolution whose columns wrap, so that south has no seam, then GroupNorm and SiLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.wrap = kernel[1] // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel[0] // 2, 0))
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d k v"]:
        """Convolve images whose last axis is the azimuth."""
        return F.silu(self.norm(self.conv(F.pad(x, (self.wrap, self.wrap, 0, 0), "circular"))))


class PolarToBEV(nn.Module):
    """Panorama -> bird's-eye-view (BEV) map of the tile (0.9 M weights).

    Each column becomes values along its ray, and the rays are laid out on the ground. Every step
    commutes with turning the panorama (exactly for quarter turns). Two 1 x 1 convolutions read the
    tile's colours and its class map (logits) off the BEV map: they make it informative before the
    UNet can use it (docs/decisions.md#bev-read-outs).
    """

    mean_rgb: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for kernel, stride, outputs in _STEM:
            layers.append(CircularConv2d(inputs, outputs, (kernel, kernel), (2, stride)))
            inputs = outputs
        self.stem = nn.Sequential(*layers)
        self.proj_in = nn.Conv2d(inputs * BEV_VIEW[0] // 2 ** len(_STEM), _WIDTH, 1)
        self.blocks = nn.ModuleList(CircularConv2d(_WIDTH, _WIDTH, (1, 5)) for _ in range(2))
        self.proj_out = nn.Conv2d(_WIDTH, channels * RADIAL_BINS, 1)
        self.to_rgb = nn.Conv2d(channels, 3, 1)
        self.to_classes = nn.Conv2d(channels, BEV_CLASSES, 1)
        self.register_buffer("mean_rgb", torch.zeros(3))

    def forward(
        self, view: Float[Tensor, "batch 3 64 256"], size: int
    ) -> Float[Tensor, "batch channel {size} {size}"]:
        """Return north-up maps, `size` cells a side over the tile's extent."""
        x = self.stem(view * 2 - 1).flatten(1, 2)[:, :, None]
        x = F.silu(self.proj_in(x))
        for block in self.blocks:
            x = x + block(x)
        x = F.dropout(x, _DROPOUT, self.training)
        polar = self.proj_out(x)[:, :, 0].unflatten(1, (-1, RADIAL_BINS))
        return geometry.polar_to_cartesian(polar, size)

    @torch.no_grad()
    def update_mean(self, tile: Float[Tensor, "batch 3 size size"]) -> None:
        """In training, follow the mean colour of tiles in [-1, 1]."""
        if self.training:
            self.mean_rgb.lerp_(tile.mean(dim=(0, 2, 3)), 1 - _MEAN_DECAY)

    def predict_rgb(
        self, bev: Float[Tensor, "batch channel size size"]
    ) -> Float[Tensor, "batch 3 size size"]:
        """Return the colours of a BEV map, about as saturated as a tile's, mostly in [0, 1]."""
        mean = self.mean_rgb[:, None, None]
        return (mean + _SATURATION_GAIN * (self.to_rgb(bev).float() - mean)) / 2 + 0.5


class Conditioner(nn.Module):
    """Projection of CLIP's tokens to the UNet's width, the null condition, and the BEV network."""

    positions: Tensor

    def __init__(
        self, *, states: int, width: int, bev_channels: int, panorama: tuple[int, int], patch: int
    ) -> None:
        """Build it for base models and panoramas of some size.

        Args:
            states: width of CLIP's hidden states.
            width: width of the UNet's cross-attention.
            bev_channels: channels of the BEV map.
            panorama: height and width of the panorama, in pixels.
            patch: side of CLIP's patches, in pixels.
        """
        super().__init__()
        self.norm = nn.LayerNorm(states)
        self.project = nn.Linear(states, width)
        # Zeros: what a base trained without any text or image has seen in its cross-attention.
        self.null = nn.Parameter(torch.zeros(width))
        azimuth, elevation = token_positions(*panorama, patch)
        features = [encode_azimuth(azimuth, _HARMONICS), elevation[:, None]]
        self.register_buffer("positions", torch.cat(features, dim=-1), persistent=False)
        self.embed_position = nn.Linear(2 * _HARMONICS + 1, width, bias=False)
        self.bev = PolarToBEV(bev_channels)

    def forward(self, features: PanoramaFeatures, size: int) -> Condition:
        """Return the condition of latents of `size` cells a side."""
        tokens = self.project(self.norm(features.clip_tokens))
        tokens = tokens + self.embed_position(self.positions)
        return Condition(tokens, self.bev(features.view, size))

    def drop(self, condition: Condition, keep: Bool[Tensor, " batch"]) -> Condition:
        """Return `condition` where `keep`; elsewhere the null as every token and an empty map."""
        rows = keep[:, None, None]
        tokens = torch.where(rows, condition.tokens, self.null.to(condition.tokens.dtype))
        return Condition(tokens, condition.bev * rows[..., None])

    def add_null(self, condition: Condition) -> Condition:
        """Return the condition and, behind it in the batch, the null of each row."""
        none = torch.zeros(len(condition.tokens), dtype=torch.bool, device=condition.tokens.device)
        return Condition(*map(torch.cat, zip(condition, self.drop(condition, none), strict=True)))


def resize_panorama(
    panorama: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 64 256"]:
    """Average RGB panoramas in [0, 1] down to the size that `PolarToBEV` takes."""
    if panorama.shape[-2:] == BEV_VIEW:
        return panorama
    return F.interpolate(panorama, BEV_VIEW, mode="area")


def count_crops(height: int, width: int) -> int:
    """Return how many square crops, as high as the panorama, cover all its columns."""
    return math.ceil(width / height)


def encode_azimuth(
    azimuth: Float[Tensor, " token"], harmonics: int
) -> Float[Tensor, "token 2*{harmonics}"]:
    """Return sine and cosine of the first multiples of an azimuth in radians."""
    multiples = azimuth[:, None] * torch.arange(1, harmonics + 1)
    return torch.cat([torch.sin(multiples), torch.cos(multiples)], dim=-1)


def token_positions(
    height: int, width: int, patch: int
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Return azimuth (radians, clockwise from north) and elevation of all crops' tokens.

    Elevation is the row, 1 at the panorama's top edge and -1 at its bottom. Order as CLIP's: for
    each crop its class token, which stands at the crop's centre, then the patches row by row.
    """
    crops = count_crops(height, width)
    side = height // patch
    centre = (torch.arange(side) + 0.5) * patch
    row, column = torch.meshgrid(centre, centre, indexing="ij")
    middle = torch.tensor([height / 2])
    row, column = torch.cat([middle, row.flatten()]), torch.cat([middle, column.flatten()])
    starts = torch.tensor(geometry.crop_starts(width, height, crops))
    azimuth = ((starts[:, None] + column) / width * 2 * math.pi - math.pi).flatten()
    return azimuth, (1 - 2 * row / height).repeat(crops)
