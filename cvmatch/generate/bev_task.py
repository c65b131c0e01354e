"""The training step of the rays alone: a cheap start for the generator's."""

import os
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from cvmatch.data.color import color_jitter
from cvmatch.generate import bev, losses
from cvmatch.generate.augment import pairs_of, varied
from cvmatch.generate.bev import Rays
from cvmatch.generate.negatives import Rivals
from cvmatch.generate.settings import Recipe
from cvmatch.nn import rng

FILE = "rays.safetensors"
"""File of the weights that `RaysTask` saves."""


class RaysTask(nn.Module):
    """The rays alone, on the terms `map`, `contrast` and `classes`."""

    def __init__(self, recipe: Recipe, size: int, channels: int, seed: int = 0) -> None:
        """`size` is the side of the map, in cells."""
        super().__init__()
        self.recipe, self.size, self.seed = recipe, size, seed
        self.rays = Rays(channels)
        self.rivals = Rivals(recipe.rivals, size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `ground`, `aerial` and `classes`."""
        pairs = varied(batch, self.recipe, self.seed) if self.training else pairs_of(batch)
        ground, known = pairs.ground, None
        if self.training:
            known = self.rivals.known(batch["key"])
            # The two views are of other hours: R@10 % of 500 by the map 88.8 to 90.4 (toy, 110 s).
            stream = rng.fold_in(self.seed, int(batch["epoch"]), "colour of ground")
            ground = color_jitter(ground, batch["key"], stream)
        drawn = self.rays(bev.view(ground), self.size)
        named = losses.map_terms(self.rays, drawn, pairs.tile, pairs.classes, known)
        if self.training:
            self.rivals.remember(batch["key"], pairs.tile)
        return {
            "loss": losses.total(self.recipe, named),
            **{name: value.detach() for name, value in named.items()},
        }

    def groups(self) -> list[dict[str, Any]]:
        """All parameters, at `lr_rays`."""
        return [{"params": list(self.rays.parameters()), "lr": self.recipe.lr_rays}]

    def save(self, directory: str) -> None:
        """Write the rays' weights."""
        os.makedirs(directory, exist_ok=True)
        save_file(self.rays.state_dict(), os.path.join(directory, FILE))

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Validation means."""
        return {name: float(value) for name, value in means.items()}
