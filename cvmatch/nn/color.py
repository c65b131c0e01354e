"""Color jitter: the augmentation that leaves a picture's geometry alone."""

from jaxtyping import Float, Int64
from torch import Tensor

from cvmatch.nn import rng

BRIGHTNESS = 0.2
"""Largest change of a view's brightness, as a share."""

CONTRAST = 0.2
"""Largest change of its contrast, as a share."""

TINT = 0.1
"""Largest change of each colour channel, as a share."""


def color_jitter(
    picture: Float[Tensor, "row 3 h w"], key: Int64[Tensor, " row"], stream: int
) -> Float[Tensor, "row 3 h w"]:
    """Change brightness, contrast and tint at random for each row; values stay in [0, 1]."""
    change = 2 * rng.uniform(key, stream, 5)[..., None, None] - 1
    mean = picture.mean(dim=(1, 2, 3), keepdim=True)
    contrast = (picture - mean) * (1 + CONTRAST * change[:, 3:4]) + mean
    gain = (1 + BRIGHTNESS * change[:, 4:5]) * (1 + TINT * change[:, :3])
    return (contrast * gain).clamp(0, 1)
