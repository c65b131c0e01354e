"""Changes of a pair that keep its geometry: panorama, tile, synthetic aerial and class map at once.

All choices are draws of (row key, epoch), so that workers, batches and restarts do not matter.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from cvmatch.data import geometry
from cvmatch.data.color import color_jitter
from cvmatch.nn import rng
from cvmatch.nn.backbones import MEAN


class Views(NamedTuple):
    """What the towers see of a batch of pairs; A and S are None where only G meets C."""

    ground: Float[Tensor, "row 3 h w"]
    """G, in [0, 1]."""
    aerial: Float[Tensor, "row 3 s s"]
    """C, in [0, 1]."""
    synthetic: Float[Tensor, "row 3 s s"] | None = None
    """A, in [0, 1]."""
    classes: UInt8[Tensor, "row s s"] | None = None
    """S, ids."""


def augmented(views: Views, key: Int64[Tensor, " row"], seed: int, epoch: int) -> Views:
    """Turn and mirror each pair as a whole; change light and sharpness of G, C and A on their own.

    The class map keeps its colours, which are names.
    """
    quarter = rng.uniform(key, rng.fold_in(seed, epoch, "turn"))
    mirror = rng.uniform(key, rng.fold_in(seed, epoch, "mirror")) < 0.5
    pair = turned(views, (quarter * 4).long(), mirror)
    changed = {
        name: _seen_anew(picture, key, seed, epoch, name)
        for name, picture in pair._asdict().items()
        if picture is not None and name != "classes"
    }
    return pair._replace(**changed)


def turned(views: Views, turns: Int64[Tensor, " row"], mirror: Bool[Tensor, " row"]) -> Views:
    """Each row's maps by `turns` quarters counter-clockwise, then east and west exchanged.

    The panorama with them (`geometry.rotate90_panorama`).
    """
    how = (turns, mirror)
    return Views(
        geometry.rotate90_panorama(views.ground, *how),
        geometry.rotate90_tile(views.aerial, *how),
        None if views.synthetic is None else geometry.rotate90_tile(views.synthetic, *how),
        None if views.classes is None else geometry.rotate90_tile(views.classes, *how),
    )


def limited(
    ground: Float[Tensor, "row 3 h w"], degrees: float, heading: Float[Tensor, " row"]
) -> Float[Tensor, "row 3 h w"]:
    """What a camera sees along `heading` (degrees clockwise from north), in the middle columns.

    The rest has ImageNet's mean colour, which the towers' normalisation turns to zero.
    """
    part = geometry.crop_field_of_view(ground, degrees, heading)
    canvas = ground.new_tensor(MEAN)[:, None, None].expand_as(ground).clone()
    first = round(ground.shape[-1] / 2 - part.shape[-1] / 2)
    canvas[..., first : first + part.shape[-1]] = part
    return canvas


def blurred(
    picture: Float[Tensor, "row 3 h w"], share: Float[Tensor, " row"]
) -> Float[Tensor, "row 3 h w"]:
    """Each picture mixed with its mean over 3 x 3 pixels, of which `share` in [0, 1] is taken."""
    mean = F.avg_pool2d(picture, 3, stride=1, padding=1, count_include_pad=False)
    return picture + share[:, None, None, None] * (mean - picture)


def _seen_anew(picture: Tensor, key: Tensor, seed: int, epoch: int, name: str) -> Tensor:
    """Other light and sharpness; half of the pictures keep theirs."""
    share = (2 * rng.uniform(key, rng.fold_in(seed, epoch, f"blur of {name}")) - 1).clamp(min=0)
    stream = rng.fold_in(seed, epoch, f"colour of {name}")
    return color_jitter(blurred(picture, share), key, stream)
