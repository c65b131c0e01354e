"""Stored encodings -> the tensors that training reads.

It imports no model: where the tasks that read waited for diffusers, the first batch of a session
came after 14 s, now after 7. Arrays are .npy files in binary columns: as Parquet's lists of
numbers, rows of 460 kB were read at 174 a second, so at 900 or more.
"""

import io
from typing import Any

import numpy as np
import ray.data
from ray.data import Dataset

from cvmatch import images, schema, storage
from cvmatch.generate import rays
from cvmatch.generate.pairs import Sizes, planes

_ROWS = 32
"""Rows of a read batch: whole blocks, whose arrays are new pages each time, gave 170 such rows a
second, this gives 240."""


def encoded(directory: str, sizes: Sizes) -> Dataset:
    """The rows that `encode` wrote, as the tensors of `pairs.decode` and `latent`, `states`."""
    filesystem, path = storage.resolve(directory)
    rows: Any = ray.data.read_parquet(path, filesystem=filesystem, file_extensions=["parquet"])
    return rows.map_batches(_tensors, fn_kwargs={"tile": sizes.tile}, batch_size=_ROWS)


def npy(arrays: np.ndarray) -> np.ndarray:
    """Arrays of one shape, each as the bytes of an .npy file."""
    found = np.empty(len(arrays), dtype=object)
    for row, array in enumerate(arrays):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        found[row] = file.getvalue()
    return found


def _tensors(batch: dict[str, np.ndarray], tile: int) -> dict[str, np.ndarray]:
    sizes = {schema.GROUND: (rays.HEIGHT, rays.WIDTH), schema.AERIAL: (tile, tile)}
    kept = {"key": batch["key"]}
    kept |= {name: _arrays(batch[name]) for name in ("latent", "states")}
    classes = [images.decode_ids(data, (tile, tile)) for data in batch[schema.CLASSES]]
    kept["classes"] = np.array(classes, dtype=np.uint8).reshape(-1, tile, tile)
    return kept | {
        name: planes([images.decode(data, size) for data in batch[name]], size)
        for name, size in sizes.items()
    }


def _arrays(found: np.ndarray) -> np.ndarray:
    """What `npy` was given."""
    return np.stack([np.load(io.BytesIO(file), allow_pickle=False) for file in found])
