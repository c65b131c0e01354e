"""The rows that the matcher trains on: what jobs/synthesize.py wrote -> tensors."""

import functools
from typing import Any

import numpy as np
import ray.data
from pyarrow import fs, parquet
from ray.data import Dataset

from cvmatch.data import images, manifest, schema, storage
from cvmatch.nn import rng

_DIRECT = (
    schema.PAIR_ID,
    schema.GROUND,
    schema.AERIAL,
    schema.LATITUDE,
    schema.LONGITUDE,
    schema.ERROR,
)
_JOINT = (*_DIRECT, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES)


def synthesized(location: str, joint: bool = True) -> Dataset:
    """Rows that jobs/synthesize.py wrote; without A and S where these are not `joint`.

    Raises:
        FileNotFoundError: no finished output there.
    """
    manifest.read(location)
    filesystem, path = storage.resolve(location)
    columns: list[str] = [*(_JOINT if joint else _DIRECT)]
    return ray.data.read_parquet(path, filesystem=filesystem, columns=columns)


def pair_ids(location: str) -> tuple[str, ...]:
    """Sorted ids of the synthesized rows without error.

    Raises:
        ValueError: there are none.
    """
    filesystem, path = storage.resolve(location)
    found: list[str] = []
    for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
        if info.path.endswith(".parquet"):
            columns = [schema.PAIR_ID, schema.ERROR]
            rows = parquet.read_table(info.path, columns=columns, filesystem=filesystem)
            found += schema.good_rows(rows)[schema.PAIR_ID].to_pylist()
    if not found:
        raise ValueError(
            f"{location}: expected Parquet rows without error, found none. Run jobs/synthesize.py, "
            "or read the reasons in the column `error`."
        )
    return tuple(sorted(found))


def decode(rows: Dataset, panorama: tuple[int, int], square: int) -> Dataset:
    """Synthesized rows -> uint8 tensors and `key`, of the pictures there are.

    Rows with `error` are left out.

    `panorama` (height, width) is the size of G, `square` the side of the maps. A row without
    `error` whose pictures cannot be decoded stops the training: synthesis has read or made them.
    """
    stage: Any = functools.partial(decode_batch, panorama=panorama, square=square)
    return rows.map_batches(stage, batch_format="numpy", batch_size=None)


def decode_batch(
    batch: dict[str, np.ndarray], panorama: tuple[int, int], square: int
) -> dict[str, np.ndarray]:
    """One batch of `decode`: `ground`, `aerial`, `key`, and where there, `synthetic`, `classes`.

    Pictures are CHW, `classes` are ids, HW.
    """
    errors = schema.read_errors(batch[schema.ERROR])
    good = [index for index, error in enumerate(errors) if error is None]
    side = (square, square)

    def pictures(column: str, size: tuple[int, int]) -> np.ndarray:
        decoded = [images.decode(batch[column][index], size) for index in good]
        pixels = np.array(decoded, dtype=np.uint8).reshape(-1, *size, 3)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    keys = [rng.row_key(str(batch[schema.PAIR_ID][index])) for index in good]
    found = {
        "ground": pictures(schema.GROUND, panorama),
        "aerial": pictures(schema.AERIAL, side),
        "key": np.array(keys, dtype=np.int64),
    }
    if schema.SYNTHETIC in batch:
        classes = [images.decode_ids(batch[schema.SYNTHETIC_CLASSES][i], side) for i in good]
        found["synthetic"] = pictures(schema.SYNTHETIC, side)
        found["classes"] = np.array(classes, dtype=np.uint8).reshape(-1, *side)
    return found
