"""Rows of pairs -> the tensors that training reads.

It imports no model: a task that decodes should not wait for diffusers (9 s of a core, measured).
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float
from ray.data import Dataset
from torch import Tensor

from cvmatch.data import images, schema
from cvmatch.nn import rng


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the pictures that a generator reads and writes, in pixels, from its configs."""

    panorama: tuple[int, int]
    """Height (CLIP's input) and width of the panorama."""
    tile: int
    """Side of the aerial picture."""
    latent: int
    """Side of its latent, in cells."""


def decode(rows: Dataset, sizes: Sizes) -> Dataset:
    """Rows of PAIRS -> the tensors `ground`, `aerial`, `classes` and `key`, without failed rows.

    Pictures are uint8 planes of `sizes`; `classes` are ids (rows, columns) of the aerial's size,
    schema.IGNORE where the row has no class map. A row without `error` whose pictures cannot be
    decoded stops the training: ingest has passed it.
    """
    decoder: Any = functools.partial(decode_batch, sizes=sizes)
    return rows.map_batches(decoder, batch_format="numpy", batch_size=None)


def decode_batch(batch: dict[str, np.ndarray], sizes: Sizes) -> dict[str, np.ndarray]:
    """One batch of `decode`."""
    good = [i for i, error in enumerate(schema.read_errors(batch[schema.ERROR])) if error is None]
    tile = (sizes.tile, sizes.tile)
    ground = [images.decode(batch[schema.GROUND][i], sizes.panorama) for i in good]
    aerial = [images.decode(batch[schema.AERIAL][i], tile) for i in good]
    classes = [_classes(batch[schema.CLASSES][i], tile) for i in good]
    keys = [rng.row_key(str(batch[schema.PAIR_ID][i])) for i in good]
    return {
        "ground": planes(ground, sizes.panorama),
        "aerial": planes(aerial, tile),
        "classes": np.array(classes, dtype=np.uint8).reshape(-1, *tile),
        "key": np.array(keys, dtype=np.int64),
    }


def planes(pictures: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Pictures (height, width, 3) of one size as uint8 planes (row, 3, height, width)."""
    if not pictures:
        return np.zeros((0, 3, *size), dtype=np.uint8)
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def pixels(planes: Float[Tensor, "row 3 height width"]) -> np.ndarray:
    """Planes in [0, 1] as uint8 pictures (row, height, width, 3)."""
    return (planes * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _classes(data: bytes | None, size: tuple[int, int]) -> np.ndarray:
    if not data:
        return np.full(size, schema.IGNORE, dtype=np.uint8)
    return images.decode_palette(data, size, len(schema.PALETTE))
