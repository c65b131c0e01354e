"""Embedded tiles (Parquet rows) -> shard directories of an index, and these, memory-mapped.

vectors.npy    (tile, width) float16, C order: a search reads its part of it
tiles.arrow    pair_id, latitude, longitude of each row; processes share its pages
shard.json     rows, tower and hashes; the shard is named by its hash
"""

import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float16, Int64, Shaped

from cvmatch.data import schema, tables
from cvmatch.data.schema import ERROR, LATITUDE, LONGITUDE, PAIR_ID, TILE_VECTOR
from cvmatch.data.tables import Reject
from cvmatch.index import versions

PART_ROW = "part_row"
"""Column of accepted tiles: their row among all rows of the parts."""

VECTORS = "vectors.npy"
"""File of the tiles' vectors."""

CHUNK = 65_536
"""Tiles a step: 160 MiB of vectors in float32 at 640 wide."""

TILES = pa.schema([schema.PAIRS.field(name) for name in (PAIR_ID, LATITUDE, LONGITUDE)])
"""What is known of each tile."""


class ShardedArray:
    """The vectors of all tiles: arrays of shards, one behind the other."""

    def __init__(self, arrays: Sequence[Float16[np.ndarray, "_ width"]]) -> None:
        self.arrays = list(arrays)
        self.starts = np.cumsum([0, *(len(array) for array in arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: Int64[np.ndarray, " row"]) -> Float16[np.ndarray, "row width"]:
        """Copy some rows, in their order."""
        copy = np.empty((len(rows), self.arrays[0].shape[1]), np.float16)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(shard):
            inside = shard == number
            copy[inside] = self.arrays[number][rows[inside] - self.starts[number]]
        return copy

    def chunks(self, size: int = CHUNK) -> Iterator[Float16[np.ndarray, "_ width"]]:
        """Iterate over all rows in their order, at most `size` at a time."""
        for array in self.arrays:
            for begin in range(0, len(array), size):
                yield array[begin : begin + size]


def select_good_rows(
    parts: str, limit: float, left_out: Sequence[Reject] = ()
) -> tuple[pa.Table, list[Reject]]:
    """Return the good rows by pair_id, with their `part_row`; and id and error of the others.

    The others are those of `parts` and the `left_out`, which count as failed.

    Raises:
        ValueError: no good row, more than the share `limit` of the rows failed, or an id is there
            twice.
    """
    # Large strings: sorting joins all ids, and a string column of over 2 GiB cannot be.
    ids = pa.field(PAIR_ID, pa.large_string())
    columns = pa.schema([ids, *list(TILES)[1:], schema.PAIRS.field(ERROR)])
    whole = pa.concat_tables(
        table.cast(columns) for table in tables.batches(parts, columns.names, CHUNK)
    )
    whole = whole.append_column(PART_ROW, pa.array(np.arange(len(whole))))
    bad = [*left_out, *schema.failed_rows(whole).select([PAIR_ID, ERROR]).to_pylist()]
    total = len(whole) + len(left_out)
    tiles = schema.good_rows(whole).sort_by(PAIR_ID).combine_chunks()
    if not len(tiles) or len(bad) > limit * total:
        raise ValueError(
            f"build-index: of {total} rows at most {limit:.1%} may fail, but {len(bad)} did, "
            f"such as {bad[:3]}. Mend these rows, or pass a larger --max-rejected."
        )
    if len(tiles[PAIR_ID].unique()) < len(tiles):
        counts = pa.Table.from_struct_array(tiles[PAIR_ID].value_counts())
        twice = counts.filter(pc.field("counts") > 1)["values"].to_pylist()
        raise ValueError(
            f"build-index: expected each pair_id once, got {len(twice)} again, such as "
            f"{twice[:3]}. A query finds its tile by the id: remove the copies."
        )
    return tiles.drop_columns([ERROR]), bad


def gather_vectors(
    parts: str, rows: Int64[np.ndarray, " tile"], width: int
) -> Float16[np.ndarray, "tile w"]:
    """Return vectors of some rows of the parts, in that order; read only files that hold some.

    Raises:
        ValueError: vectors of another width than `width`, or not finite in half precision.
    """
    gathered = np.empty((len(rows), width), np.float16)
    order = np.argsort(rows)
    ordered = rows[order]
    for file_begin, file_end, name in _row_ranges(parts):
        if np.diff(np.searchsorted(ordered, [file_begin, file_end])) == 0:
            continue
        begin = file_begin
        for table in tables.batches(parts, [TILE_VECTOR], CHUNK, [name]):
            first, last = np.searchsorted(ordered, [begin, begin + len(table)])
            if last > first:
                values = _matrix(table[TILE_VECTOR].combine_chunks(), width)
                gathered[order[first:last]] = _finite(values[ordered[first:last] - begin], parts)
            begin += len(table)
    return gathered


def write_shard_files(
    folder: str, vectors: Float16[np.ndarray, "tile width"], tiles: pa.Table, tower: str
) -> str:
    """Write a shard; return its name. `tower`: fingerprint of what embedded the tiles."""
    os.makedirs(folder)
    np.save(os.path.join(folder, VECTORS), vectors)
    # Made anew, since equal columns may have other buffers, and so other bytes, by their history.
    table = pa.table([tiles[name].to_pylist() for name in TILES.names], schema=TILES)
    with pa.ipc.new_file(os.path.join(folder, "tiles.arrow"), TILES) as file:
        file.write_table(table)
    files = {n: dataclasses.asdict(i) for n, i in versions.hash_files(folder, "").items()}
    text = json.dumps({"rows": len(tiles), "tower": tower, "files": files}, sort_keys=True)
    versions.write_file(os.path.join(folder, "shard.json"), text.encode())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_shard(folder: str, rereads: bool) -> tuple[Float16[np.ndarray, "tile width"], pa.Table]:
    """Memory-map vectors and the tiles. `rereads`: vectors will be read whole, not in spots."""
    with open(os.path.join(folder, VECTORS), "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        # Nothing writes to it, but torch takes only memory that it might: pages stay shared.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if not rereads and hasattr(mmap, "MADV_RANDOM"):
            # A cold gather is 5 times faster: docs/decisions.md#shards-are-read-without-read-ahead
            content.madvise(mmap.MADV_RANDOM)
        vectors = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)
    with pa.memory_map(os.path.join(folder, "tiles.arrow")) as file:
        return vectors, pa.ipc.open_file(file).read_all()


def read_tower(folder: str) -> str:
    """Return the fingerprint of what embedded the tiles of a shard."""
    with open(os.path.join(folder, "shard.json"), encoding="utf-8") as file:
        return json.load(file)["tower"]


def _row_ranges(parts: str) -> Iterator[tuple[int, int, str]]:
    """Iterate over the files: first row, row behind the last, and name."""
    begin = 0
    for name, count in zip(tables.files(parts), tables.rows(parts), strict=True):
        yield begin, begin + count, name
        begin += count


def _finite(values: np.ndarray, parts: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(
            f"build-index: tile_vector of some rows of {parts} is not finite in half precision "
            "(65,504 at most). Check the matcher's training."
        )
    return values


def _matrix(column: pa.Array, width: int) -> Shaped[np.ndarray, "row width"]:
    values = column.storage if isinstance(column, pa.ExtensionArray) else column  # Ray's tensors
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if flat.size != len(column) * width:
        raise ValueError(
            f"build-index: expected tile_vector of {width} numbers a row, as the matcher has, got "
            f"{flat.size} for {len(column)} rows. Embed the tiles with the model that is indexed."
        )
    with np.errstate(over="ignore"):  # beyond fp16: reported by the caller
        return flat.reshape(-1, width).astype(np.float16)
