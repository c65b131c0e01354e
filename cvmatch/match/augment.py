"""Augmentation that keeps a pair's geometry: panorama, tile, synthetic aerial and class map alike.

Random numbers are a function of row key and epoch, so workers, batches and restarts do not matter.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from cvmatch.nn import geometry, rng
from cvmatch.nn.backbones import MEAN
from cvmatch.nn.color import color_jitter


class TowerInputs(NamedTuple):
    """What the towers see of a batch of pairs; A and S are None where only G meets C."""

    ground: Float[Tensor, "row 3 h w"]
    """G, in [0, 1]."""
    aerial: Float[Tensor, "row 3 s s"]
    """C, in [0, 1]."""
    synthetic: Float[Tensor, "row 3 s s"] | None = None
    """A, in [0, 1]."""
    synthetic_mask: UInt8[Tensor, "row s s"] | None = None
    """S, ids."""


def augment(inputs: TowerInputs, key: Int64[Tensor, " row"], seed: int, epoch: int) -> TowerInputs:
    """Turn and mirror each pair as a whole; jitter colours and sharpness of G, C and A each.

    The class map keeps its ids.
    """
    quarter = rng.uniform(key, rng.fold_in(seed, epoch, "turn"))
    mirror = rng.uniform(key, rng.fold_in(seed, epoch, "mirror")) < 0.5
    pair = rotate90_pair(inputs, (quarter * 4).long(), mirror)
    jittered = {
        name: _jitter(picture, key, seed, epoch, name)
        for name, picture in pair._asdict().items()
        if picture is not None and name != "synthetic_mask"
    }
    return pair._replace(**jittered)


def rotate90_pair(
    inputs: TowerInputs, turns: Int64[Tensor, " row"], mirror: Bool[Tensor, " row"]
) -> TowerInputs:
    """Turn each row's maps by `turns` quarters counter-clockwise, then exchange east and west.

    The panorama moves with them (`geometry.rotate90_panorama`).
    """
    tiles = {
        name: geometry.rotate90_tile(tile, turns, mirror)
        for name, tile in inputs._asdict().items()
        if name != "ground" and tile is not None
    }
    ground = geometry.rotate90_panorama(inputs.ground, turns, mirror)
    return inputs._replace(ground=ground, **tiles)


def crop_fov(
    ground: Float[Tensor, "row 3 h w"],
    degrees: float,
    heading: Float[Tensor, " row"],
    fill: Sequence[float] = MEAN,
) -> Float[Tensor, "row 3 h w"]:
    """Keep what a camera sees of panoramas, in the middle columns.

    Args:
        ground: Panoramas in [0, 1].
        degrees: Field of view, in (0, 360].
        heading: Degrees clockwise from north, of the middle.
        fill: Colour of the rest, in [0, 1]: the mean that the tower's normalisation turns to zero.
    """
    part = geometry.crop_field_of_view(ground, degrees, heading)
    canvas = ground.new_tensor(fill)[:, None, None].expand_as(ground).clone()
    first = round(ground.shape[-1] / 2 - part.shape[-1] / 2)
    canvas[..., first : first + part.shape[-1]] = part
    return canvas


def blur(
    picture: Float[Tensor, "row 3 h w"], share: Float[Tensor, " row"]
) -> Float[Tensor, "row 3 h w"]:
    """Mix each picture with its mean over 3 x 3 pixels, of which `share` in [0, 1] is taken."""
    mean = F.avg_pool2d(picture, 3, stride=1, padding=1, count_include_pad=False)
    return picture + share[:, None, None, None] * (mean - picture)


def _jitter(picture: Tensor, key: Tensor, seed: int, epoch: int, name: str) -> Tensor:
    """Blur half of the pictures, each by its own share, and jitter the colours of all."""
    share = (2 * rng.uniform(key, rng.fold_in(seed, epoch, f"blur of {name}")) - 1).clamp(min=0)
    return color_jitter(blur(picture, share), key, rng.fold_in(seed, epoch, f"colour of {name}"))
