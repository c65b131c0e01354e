"""Rows of pairs -> the tensors that training reads; and a picture of what a model draws of them."""

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from ray.data import Dataset
from torch import Tensor
from torch.nn import functional as F

from cvmatch import draws, images, schema
from cvmatch.generate import parts
from cvmatch.generate.model import Generator


def decode(rows: Dataset, sizes: parts.Sizes) -> Dataset:
    """Rows of PAIRS -> `ground`, `aerial` (uint8, CHW, of `sizes`) and `key`, without failed rows.

    A row without `error` whose pictures cannot be decoded stops the training: ingest has passed it.
    """
    decoder: Any = functools.partial(decode_batch, sizes=sizes)
    return rows.map_batches(decoder, batch_format="numpy", batch_size=None)


def decode_batch(batch: dict[str, np.ndarray], sizes: parts.Sizes) -> dict[str, np.ndarray]:
    """One batch of `decode`."""
    good = [i for i, error in enumerate(batch[schema.ERROR]) if not error]
    tile = (sizes.tile, sizes.tile)
    ground = [images.decode(batch[schema.GROUND][i], sizes.panorama) for i in good]
    aerial = [images.decode(batch[schema.AERIAL][i], tile) for i in good]
    keys = [draws.key(str(batch[schema.PAIR_ID][i])) for i in good]
    return {
        "ground": _planes(ground, sizes.panorama),
        "aerial": _planes(aerial, tile),
        "key": np.array(keys, dtype=np.int64),
    }


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


def _planes(pictures: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    if not pictures:
        return np.zeros((0, 3, *size), dtype=np.uint8)
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def _high(picture: Float[Tensor, "b 3 h w"], height: int) -> Float[Tensor, "b 3 {height} v"]:
    width = round(picture.shape[-1] * height / picture.shape[-2])
    return F.interpolate(picture, (height, width), mode="bilinear", antialias=True)
