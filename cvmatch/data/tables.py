"""Rows on disk, a small table at a time."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
from pyarrow import parquet

from cvmatch.data import schema, storage


def files(location: str) -> list[str]:
    """List the names of a directory's Parquet files, sorted.

    Raises:
        FileNotFoundError: none there.
    """
    names = [name for name in storage.names(location) if name.endswith(".parquet")]
    if not names:
        raise FileNotFoundError(
            f"{location}: expected Parquet files of rows, found none. Run the job that writes them "
            "(cvmatch synthesize) to the end, or pass another location."
        )
    return names


def rows(location: str) -> list[int]:
    """Return the number of rows of each of its `files`."""
    filesystem, path = storage.resolve(location)
    counts = []
    for name in files(location):
        with filesystem.open_input_file(storage.join(path, name)) as file:
            counts.append(parquet.read_metadata(file).num_rows)
    return counts


def sizes(location: str) -> list[tuple[str, int]]:
    """Return name and bytes of each of its `files`, which stand for the content."""
    filesystem, path = storage.resolve(location)
    names = files(location)
    infos = filesystem.get_file_info([storage.join(path, name) for name in names])
    return [(name, one.size) for name, one in zip(names, infos, strict=True)]


def columns(location: str) -> list[str]:
    """Return the columns of the first of its `files`."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(storage.join(path, files(location)[0])) as file:
        return parquet.read_schema(file).names


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
                for column in set(columns) - set(have):
                    table = table.append_column(column, pa.nulls(len(table), _type(column)))
                yield table.select(list(columns))


def _type(column: str) -> pa.DataType:
    known = column in schema.SYNTHESIZED.names
    return schema.SYNTHESIZED.field(column).type if known else pa.null()
