"""A picture larger than the network's input -> overlapping windows -> their logits, blended."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cvmatch.segment.batches import Preprocess

BATCH = 8
"""Windows that are scored at a time."""

Scores = Callable[[Tensor], Tensor]
"""Windows (n, 3, size, size) -> their logits (n, classes, size, size)."""


def blend(
    scores: Scores, picture: UInt8[Tensor, "3 h w"], preprocess: Preprocess, overlap: float
) -> Float[Tensor, "classes h w"]:
    """Logits at the picture's own resolution: the weighted mean over the windows that see a pixel.

    A window weighs most in its middle and next to nothing at its border, where it sees least: so
    there are no seams. A side shorter than a window is continued by its last pixels.
    """
    size, (height, width) = preprocess.size, picture.shape[-2:]
    below, right = (
        torch.arange(max(side, size), device=picture.device).clamp(max=side - 1)
        for side in (height, width)
    )
    whole = picture[:, below[:, None], right]
    # The last plane sums the weights.
    total = torch.zeros(preprocess.num_classes + 1, *whole.shape[-2:], device=picture.device)
    weight = _weight(size, picture.device)
    columns = starts(width, size, overlap)
    corners = [(top, left) for top in starts(height, size, overlap) for left in columns]
    for begin in range(0, len(corners), BATCH):
        places = [
            (slice(None), slice(top, top + size), slice(left, left + size))
            for top, left in corners[begin : begin + BATCH]
        ]
        found = scores(torch.stack([whole[place] for place in places]))
        for place, logits in zip(places, found, strict=True):
            total[place] += torch.cat([weight * logits, weight[None]])
    return (total[:-1] / total[-1])[:, :height, :width]


def starts(length: int, size: int, overlap: float) -> list[int]:
    """First pixels of the fewest windows of `size` that cover `length`; [0] where one does.

    They are spread evenly, and neighbours share at least `overlap` (in [0, 1)) of their size.
    """
    stride = max(1, math.floor(size * (1 - overlap)))
    gaps = math.ceil(max(0, length - size) / stride)
    return [0, *(round(gap * (length - size) / gaps) for gap in range(1, gaps + 1))]


def _weight(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    """A pyramid, from about 1 in the middle to (2 / size)^2 in the corners."""
    place = torch.arange(size, device=device)
    ramp = torch.minimum(place + 1, size - place) * 2 / size
    return ramp[:, None] * ramp
