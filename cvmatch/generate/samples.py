"""A picture of what a generator draws."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cvmatch.generate.model import Generator


def sample_grid(generator: Generator, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Picture (uint8) with a row for each pair: panorama, synthetic aerial, true aerial."""
    ground = torch.from_numpy(np.array(batch["ground"]))
    keys = torch.from_numpy(np.array(batch["key"]))
    at = generator.device
    drawn = generator.sample(ground.to(at).float() / 255, keys.to(at)).cpu()
    aerial = torch.from_numpy(np.array(batch["aerial"])).float() / 255
    columns = [_high(ground.float() / 255, generator.tile), drawn, aerial]
    grid = torch.cat(columns, dim=-1).permute(0, 2, 3, 1).flatten(0, 1)
    return (grid.clamp(0, 1) * 255).round().byte().numpy()


def _high(picture: Float[Tensor, "b 3 h w"], height: int) -> Float[Tensor, "b 3 {height} v"]:
    width = round(picture.shape[-1] * height / picture.shape[-2])
    return F.interpolate(picture, (height, width), mode="bilinear", antialias=True)
