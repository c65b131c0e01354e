"""A picture of what a generator draws."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


def sheet(
    ground: Float[Tensor, "row 3 h w"],
    drawn: Float[Tensor, "row 3 size size"],
    aerial: Float[Tensor, "row 3 size size"],
) -> UInt8[np.ndarray, "height width 3"]:
    """Picture of rows, one above the other: panorama, synthetic aerial, true aerial, in [0, 1]."""
    columns = [_high(ground, drawn.shape[-1]), drawn, aerial]
    grid = torch.cat(columns, dim=-1).permute(0, 2, 3, 1).flatten(0, 1)
    return (grid.clamp(0, 1) * 255).round().byte().cpu().numpy()


def _high(picture: Float[Tensor, "b 3 h w"], height: int) -> Float[Tensor, "b 3 {height} v"]:
    width = round(picture.shape[-1] * height / picture.shape[-2])
    return F.interpolate(picture, (height, width), mode="bilinear", antialias=True)
