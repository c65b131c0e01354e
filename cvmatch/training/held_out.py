"""Training pairs that neither the generator nor the matcher learns from.

What is fitted behind both, the weights of the matcher's branches, needs pairs whose A is as good as
that of a new place: docs/decisions.md#weights-of-the-branches.
"""

import functools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from cvmatch.data import schema
from cvmatch.nn import rng

HELD_OUT = 64
"""Training pairs that are held out, at most a tenth."""


def choose_held_out(ids: Sequence[str]) -> list[str]:
    """Choose pairs, the same ones of the same ids in every training."""
    return sorted(ids, key=rng.row_key)[: min(HELD_OUT, len(ids) // 10)]


def select_pairs(rows: Dataset, ids: Sequence[str], inside: bool) -> Dataset:
    """Keep the rows (with `pair_id`) of some ids, or all others."""
    keep: Any = functools.partial(_keep, ids=list(ids), inside=inside)
    return rows.map_batches(keep, batch_format="pyarrow", batch_size=None)


def _keep(rows: pa.Table, ids: list[str], inside: bool) -> pa.Table:
    found = pc.field(schema.PAIR_ID).isin(ids)
    return rows.filter(found if inside else ~found)
