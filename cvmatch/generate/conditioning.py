"""The trained half of conditioning: CLIP states and panorama -> what the UNet is told."""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cvmatch.generate.bev import Rays, angles, token_places
from cvmatch.generate.settings import Conditioning


class Seen(NamedTuple):
    """What the trained parts are given of a panorama (`Generator.look`)."""

    states: Float[Tensor, "batch token state"]
    """CLIP's states of the azimuth crops: all tokens, or their pooled mean (one)."""
    view: Float[Tensor, "batch 3 rows columns"]
    """The panorama at the size of the rays, in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """What one UNet call is told: tokens for the cross-attention, and the map (or None)."""

    tokens: Float[Tensor, "batch token width"]
    map: Float[Tensor, "batch channel size size"] | None

    def rolled(self) -> "Condition":
        """The condition of the next row of the batch: what a dead condition would not notice."""
        shifted = None if self.map is None else self.map.roll(1, 0)
        return Condition(self.tokens.roll(1, 0), shifted)


class Conditioner(nn.Module):
    """Projection of CLIP's tokens to the UNet's width, the null condition, and the rays."""

    places: Tensor

    def __init__(
        self, config: Conditioning, *, states: int, width: int, height: int, patch: int
    ) -> None:
        """`states`, `width`: of CLIP and of the UNet's cross-attention; the rest in pixels."""
        super().__init__()
        if config.crops * height < config.panorama_width:
            raise ValueError(
                f"conditioning: {config.crops} crops of {height} pixels leave columns of the "
                f"{config.panorama_width} pixels wide panorama unseen. Pass --conditioning.crops "
                f"{-(-config.panorama_width // height)} or a smaller --conditioning.panorama-width."
            )
        self.config = config
        self.norm = nn.LayerNorm(states)
        self.project = nn.Linear(states, width)
        # Zeros: what a base trained without any text or picture has seen in its cross-attention.
        self.null = nn.Parameter(torch.zeros(width))
        if config.mode != "pooled":
            azimuth, elevation = token_places(height, config.panorama_width, config.crops, patch)
            features = [angles(azimuth, config.harmonics), elevation[:, None]]
            self.register_buffer("places", torch.cat(features, dim=-1), persistent=False)
            self.place = nn.Linear(2 * config.harmonics + 1, width, bias=False)
        if config.geometry:
            self.rays = Rays(config.channels)

    def forward(self, seen: Seen, size: int) -> Condition:
        """Condition for latents of `size` cells a side."""
        tokens = self.project(self.norm(seen.states))
        if self.config.mode != "pooled":
            tokens = tokens + self.place(self.places)
        return Condition(tokens, self.rays(seen.view, size) if self.config.geometry else None)

    def dropped(self, condition: Condition, keep: Bool[Tensor, " batch"]) -> Condition:
        """`condition` where `keep`; elsewhere the learned null as every token, and an empty map."""
        rows = keep[:, None, None]
        tokens = torch.where(rows, condition.tokens, self.null.to(condition.tokens.dtype))
        if condition.map is None:
            return Condition(tokens, None)
        return Condition(tokens, condition.map * rows[..., None])
