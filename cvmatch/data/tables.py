"""Rows on disk, a small table at a time, and what their files' footers say of them.

All files of a location are `storage.list_files`; a column that a file lacks is null in its rows.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from pyarrow import fs, parquet

from cvmatch.data import schema, storage

READERS = 16
"""Files that are opened at a time: a store answers after a tenth of a second."""


Reject = dict[str, str | None]
"""A row that cannot be used: its `pair_id`, or None, and `error`."""


@dataclass(frozen=True)
class RowFile:
    """A file of rows."""

    name: str
    """Relative to the location."""
    rows: int
    """All of them."""
    columns: pa.Schema
    """Its columns, as Arrow reads them."""
    nameless: tuple[int, ...] = ()
    """Rows (0 is the first) without a `pair_id`: null, empty or blank. They are never read."""


def files(location: str) -> list[str]:
    """List the names of a location's Parquet files, those of folders below too, sorted.

    Raises:
        FileNotFoundError: none there.
    """
    names = storage.list_files(location, ".parquet")
    if not names:
        raise FileNotFoundError(
            f"{location}: expected Parquet files of rows, found none. Run the job that writes them "
            "(cvmatch synthesize) to the end, or pass another location."
        )
    return names


def inspect(location: str) -> list[RowFile]:
    """Read the footers of all `files`; the ids only where a footer does not vouch for them.

    Raises:
        FileNotFoundError: no Parquet file there.
        ValueError: one is no Parquet file; names it.
    """
    filesystem, path = storage.resolve(location)
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(partial(_inspect, filesystem, path), files(location)))


def count(location: str) -> int:
    """Count the rows that a dataset reads (`row_files.read`): all but the nameless ones."""
    return sum(file.rows - len(file.nameless) for file in inspect(location))


def find_nameless(location: str) -> list[Reject]:
    """Return the rows that no `pair_id` names."""
    reason = f"{schema.PAIR_ID} is null, empty or blank"
    return [
        {schema.PAIR_ID: None, schema.ERROR: f"{file.name} row {row}: {reason}"}
        for file in inspect(location)
        for row in file.nameless
    ]


def list_paths(location: str) -> tuple[fs.FileSystem, list[str]]:
    """Return the file system of a location, and the paths in it of its `files`."""
    filesystem, path = storage.resolve(location)
    return filesystem, [storage.join(path, name) for name in files(location)]


def rows(location: str) -> list[int]:
    """Return the number of rows of each of its `files`."""
    return [file.rows for file in inspect(location)]


def sizes(location: str) -> list[tuple[str, int]]:
    """Return name and bytes of each of its `files`, which stand for the content."""
    filesystem, path = storage.resolve(location)
    names = files(location)
    infos = filesystem.get_file_info([storage.join(path, name) for name in names])
    return [(name, one.size) for name, one in zip(names, infos, strict=True)]


def batches(
    location: str, columns: Sequence[str], size: int = 64, names: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield tables of at most `size` rows of all Parquet files (or of `names`), in their order.

    A column that a file lacks is null.

    Raises:
        FileNotFoundError: no Parquet file there.
    """
    filesystem, path = storage.resolve(location)
    for name in files(location) if names is None else names:
        with filesystem.open_input_file(storage.join(path, name)) as file:
            content = parquet.ParquetFile(file)
            have = [column for column in columns if column in content.schema_arrow.names]
            for batch in content.iter_batches(size, columns=have):
                table = pa.Table.from_batches([batch])
                yield schema.conform(table, _wanted(columns, table))


def _wanted(columns: Sequence[str], table: pa.Table) -> pa.Schema:
    """Return the types of columns: those of rows, and of other columns the file's."""
    fields = []
    for name in columns:
        if name in schema.SYNTHESIZED.names:
            fields.append(schema.SYNTHESIZED.field(name).with_nullable(True))
        else:
            kind = table.schema.field(name).type if name in table.column_names else pa.null()
            fields.append(pa.field(name, kind))
    return pa.schema(fields)


@storage.retry_passing
def _inspect(filesystem: fs.FileSystem, path: str, name: str) -> RowFile:
    location = storage.join(path, name)
    try:
        with filesystem.open_input_file(location) as file:
            content = parquet.ParquetFile(file)
            return RowFile(
                name, content.metadata.num_rows, content.schema_arrow, _find_nameless(content)
            )
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{location}: expected a Parquet file, got what cannot be read as one ({error}). "
            "Write it again, or move it away."
        ) from error


def _find_nameless(content: parquet.ParquetFile) -> tuple[int, ...]:
    if schema.PAIR_ID not in content.schema_arrow.names:
        return tuple(range(content.metadata.num_rows))
    if all(map(_vouches, _id_statistics(content.metadata))):
        return ()
    ids = content.read(columns=[schema.PAIR_ID])[schema.PAIR_ID]
    return tuple(np.flatnonzero(~schema.has_id(ids).to_numpy(zero_copy_only=False)).tolist())


def _id_statistics(metadata: parquet.FileMetaData) -> list[parquet.Statistics | None]:
    column = metadata.schema.names.index(schema.PAIR_ID)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [group.column(column).statistics for group in groups]


def _vouches(statistics: parquet.Statistics | None) -> bool:
    """Return whether there is an id in each row: blanks come before all other text."""
    if statistics is None or not statistics.has_null_count or statistics.null_count:
        return False
    least = statistics.min if statistics.has_min_max else None
    return isinstance(least, int) or (isinstance(least, str) and least[:1] > " ")
