"""The rows that the matcher trains on: what cvmatch synthesize wrote -> tensors."""

import functools
from typing import Any

import numpy as np
from ray.data import Dataset

from cvmatch.data import images, manifest, row_files, schema, tables
from cvmatch.nn import rng

_ALWAYS = (schema.PAIR_ID, schema.AERIAL, schema.LATITUDE, schema.LONGITUDE, schema.ERROR)
_PICTURES = {"G": schema.GROUND, "A": schema.SYNTHETIC, "S": schema.SYNTHETIC_CLASSES}
_IDS = 65_536  # ids a step


def read_pairs(location: str, letters: str) -> Dataset:
    """Read the rows that cvmatch synthesize wrote, with the pictures of `letters` (G, A, S) and C.

    Raises:
        FileNotFoundError: no finished output there.
    """
    manifest.read(location)
    columns = [*_ALWAYS, *(_PICTURES[letter] for letter in letters)]
    return row_files.read(location, columns, needed=columns)


def read_pair_ids(location: str) -> tuple[str, ...]:
    """Read the sorted ids of the synthesized rows without error.

    Raises:
        ValueError: there are none.
    """
    ids = [
        pair_id
        for table in tables.batches(location, [schema.PAIR_ID, schema.ERROR], _IDS)
        for pair_id in schema.good_rows(table)[schema.PAIR_ID].to_pylist()
    ]
    if not ids:
        raise ValueError(
            f"{location}: expected Parquet rows without error, found none. Run cvmatch synthesize, "
            "or read the reasons in the column `error`."
        )
    return tuple(sorted(ids))


def decode(rows: Dataset, panorama: tuple[int, int], tile_size: int) -> Dataset:
    """Decode synthesized rows to uint8 tensors and `key`; rows with `error` are left out.

    A row without `error` whose pictures cannot be decoded stops the training: synthesis has read or
    made them.

    Args:
        rows: Rows of `schema.SYNTHESIZED`, with or without A and S.
        panorama: Height and width of G, in pixels.
        tile_size: Height and width of C, A and S, in pixels.
    """
    stage: Any = functools.partial(decode_batch, panorama=panorama, tile_size=tile_size)
    return rows.map_batches(stage, batch_format="numpy", batch_size=None)


def decode_batch(
    batch: dict[str, np.ndarray], panorama: tuple[int, int], tile_size: int
) -> dict[str, np.ndarray]:
    """Decode one batch to `ground`, `aerial`, `key`, and where there, `synthetic` and its mask.

    Pictures are CHW; `synthetic_mask` are ids, HW.
    """
    errors = schema.read_errors(batch[schema.ERROR])
    good = [index for index, error in enumerate(errors) if error is None]
    side = (tile_size, tile_size)

    def pictures(column: str, size: tuple[int, int]) -> np.ndarray:
        decoded = [images.decode(batch[column][index], size) for index in good]
        pixels = np.array(decoded, dtype=np.uint8).reshape(-1, *size, 3)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    keys = [rng.row_key(str(batch[schema.PAIR_ID][index])) for index in good]
    tensors = {
        "ground": pictures(schema.GROUND, panorama),
        "aerial": pictures(schema.AERIAL, side),
        "key": np.array(keys, dtype=np.int64),
    }
    if schema.SYNTHETIC in batch:
        tensors["synthetic"] = pictures(schema.SYNTHETIC, side)
    if schema.SYNTHETIC_CLASSES in batch:
        masks = [images.decode_ids(batch[schema.SYNTHETIC_CLASSES][i], side) for i in good]
        tensors["synthetic_mask"] = np.array(masks, dtype=np.uint8).reshape(-1, *side)
    return tensors
