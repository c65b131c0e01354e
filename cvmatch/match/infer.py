"""Embed rows with a trained matcher: the vectors of tiles and of queries."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cvmatch.data import images, schema
from cvmatch.match.heads import QUERY_VECTOR, TILE_VECTOR
from cvmatch.match.model import Matcher
from cvmatch.match.settings import Embed, Modality
from cvmatch.nn.batch_invariant import FixedBatch, call_rows, error_line, require_any
from cvmatch.runtime import hardware

if TYPE_CHECKING:  # it takes three seconds of a core, and the search of a file needs none of it
    from ray.data import Dataset


def _decode(
    batch: dict[str, np.ndarray],
    decoders: dict[str, Callable[[bytes], np.ndarray]],
    stage: str,
) -> tuple[list[int], np.ndarray, tuple[list[np.ndarray], ...]]:
    """Return the good rows, every row's error, and the good rows' pictures of each column."""
    schema.require(batch, [*decoders, schema.ERROR], stage)
    errors = np.array(schema.read_errors(batch[schema.ERROR]), dtype=object)
    good: list[int] = []
    pictures: dict[str, list[np.ndarray]] = {column: [] for column in decoders}
    for index in range(len(errors)):
        if errors[index] is not None:
            continue
        column = ""
        try:
            row = {}
            for column, decode in decoders.items():
                row[column] = decode(batch[column][index] or b"")
        except images.BadImage as error:
            errors[index] = f"{stage}: {column}: {error}"
            continue
        good.append(index)
        for name, picture in row.items():
            pictures[name].append(picture)
    return good, errors, tuple(pictures.values())


def _drop_pictures(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in batch.items() if name not in _PICTURES}


def _planes(pictures: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
