"""Training pairs that neither the generator nor the matcher learns from.

What is fitted behind both, the weights of the matcher's branches, needs pairs whose A is as good as
that of a new place: docs/decisions.md#weights-of-the-branches.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.data import Dataset

from cvmatch.nn import rng

HELD_OUT = 64
"""Training pairs that are held out, at most a tenth."""


def choose_held_out(ids: Sequence[str]) -> list[str]:
    """Choose pairs, the same ones of the same ids in every training."""
    return sorted(ids, key=rng.row_key)[: min(HELD_OUT, len(ids) // 10)]


def select_pairs(rows: Dataset, ids: Sequence[str], inside: bool) -> Dataset:
    """Keep the decoded rows (with `key`) of some ids, or all others."""
    keys = np.array([rng.row_key(one) for one in ids], dtype=np.int64)
    keep: Any = functools.partial(_keep, keys=keys, inside=inside)
    return rows.map_batches(keep, batch_format="numpy", batch_size=None)


def _keep(batch: dict[str, np.ndarray], keys: np.ndarray, inside: bool) -> dict[str, np.ndarray]:
    kept = np.isin(batch["key"], keys) == inside
    return {name: values[kept] for name, values in batch.items()}
