"""Stored encodings -> the tensors that training reads.

It imports no model: where the tasks that read waited for diffusers, the first batch of a session
came after 14 s, now after 7. Arrays are .npy files in binary columns: as Parquet's lists of
numbers, rows of 460 kB were read at 174 a second, so at 900 or more. Pictures are arrays too: to
decode two PNG was 1.0 of the 1.25 ms of a core that a toy row took.
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Dataset

from cvmatch.data import schema, storage

_ARRAYS = (schema.GROUND, schema.AERIAL, schema.CLASSES, "latent", "states")

ROWS = pa.schema(
    [
        pa.field(schema.PAIR_ID, pa.string(), nullable=False),
        pa.field("key", pa.int64()),
        *(pa.field(name, pa.binary()) for name in _ARRAYS),
        pa.field(schema.ERROR, pa.string()),  # why the row failed: then all but its id is null
    ]
)
"""Columns on disk. `ground` is the rays' view of the panorama, then that of the mirrored one where
pairs are mirrored; `latent` and `states` are of each variant."""

_ROWS = 32
"""Rows of a read batch: whole blocks, whose arrays are new pages each time, gave 170 such rows a
second, this gives 240."""


def encoded(directory: str) -> Dataset:
    """The good rows that `encode` wrote, as `tensors`."""
    filesystem, path = storage.resolve(directory)
    files = [name for name in storage.names(directory) if name.endswith(".parquet")]
    rows: Any = ray.data.read_parquet(
        path,
        filesystem=filesystem,
        file_extensions=["parquet"],
        filter=pc.field(schema.ERROR).is_null(),
        # Else Ray splits the rows of few files into 200 blocks, and makes a task of each: of five
        # rows of the toy models' 960, which were read at 370 a second in place of 550.
        override_num_blocks=len(files),
    )
    return rows.map_batches(tensors, batch_size=_ROWS)


def npy(arrays: np.ndarray) -> np.ndarray:
    """Arrays of one shape, each as the bytes of an .npy file."""
    found = np.empty(len(arrays), dtype=object)
    for row, array in enumerate(arrays):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        found[row] = file.getvalue()
    return found


def tensors(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Good rows -> the tensors of `pairs.decode`, `latent`, `states` and maybe `mirrored`.

    `ground` and `mirrored` are views of the panorama and of the mirrored one.
    """
    found = {"key": batch["key"], **{name: _arrays(batch[name]) for name in _ARRAYS}}
    views = found[schema.GROUND]
    mirrored = {"mirrored": views[:, 1]} if views.shape[1] > 1 else {}
    return {**found, schema.GROUND: views[:, 0], **mirrored}


def _arrays(found: np.ndarray) -> np.ndarray:
    """What `npy` was given."""
    return np.stack([np.load(io.BytesIO(file), allow_pickle=False) for file in found])
