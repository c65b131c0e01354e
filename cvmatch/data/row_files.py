"""Rows on disk -> a Ray dataset, whoever wrote them: cvmatch, pandas, Hugging Face, a spreadsheet.

A dataset reads the files that `tables.inspect` counts, and no others.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset
from ray.data.expressions import col

from cvmatch.data import schema, storage, tables
from cvmatch.data.tables import RowFile


def read(location: str, columns: Sequence[str], needed: Sequence[str] = ()) -> Dataset:
    """Read columns of `schema.SYNTHESIZED`; one that a file lacks is null in its rows.

    Rows without a `pair_id` are left out (`tables.count` leaves them out, too); those with an
    impossible position say so in `error`, where it is among the columns.

    Args:
        location: directory or URI of Parquet files, which may lie in folders below.
        columns: those to read.
        needed: those that some file must have.

    Raises:
        FileNotFoundError: no Parquet file there.
        ValueError: a needed column is in none of them, or one is no Parquet file.
    """
    files = tables.inspect(location)
    schema.require({name for file in files for name in file.columns.names}, needed, location)
    wanted = pa.schema([schema.SYNTHESIZED.field(name) for name in columns])
    filesystem, path = storage.resolve(location)
    parts = []
    # Ray takes the columns and types of all files from the first.
    for group in _group_alike(files, columns):
        rows: Any = ray.data.read_parquet(
            [storage.join(path, file.name) for file in group],
            filesystem=filesystem,
            columns=[name for name in columns if name in group[0].columns.names],
            file_extensions=None,
            partitioning=None,
        )
        if any(file.nameless for file in group):
            # In the read: a stream that is resumed compares ids, which nulls cannot be.
            rows = rows.filter(expr=col(schema.PAIR_ID).is_not_null())
        arguments = {"wanted": wanted}
        parts.append(
            rows.map_batches(_clean, fn_kwargs=arguments, batch_format="pyarrow", batch_size=None)
        )
    if not parts:
        raise ValueError(
            f"{location}: expected rows with a {schema.PAIR_ID}, got none. Nothing was done."
        )
    first, *rest = parts
    return first.union(*rest) if rest else first


def _clean(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    return schema.reject_unusable(schema.conform(table, wanted))


def _group_alike(files: Sequence[RowFile], columns: Sequence[str]) -> list[list[RowFile]]:
    """Group the files that have rows with ids by the columns, and types, that they have."""
    groups: dict[tuple[str, ...], list[RowFile]] = {}
    for file in files:
        if len(file.nameless) < file.rows:
            alike = tuple(
                str(file.columns.field(name)) for name in columns if name in file.columns.names
            )
            groups.setdefault(alike, []).append(file)
    return list(groups.values())
