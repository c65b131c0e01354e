"""Embedded tiles (Parquet rows) -> shard directories of an index, and these, memory-mapped.

u.npy           (tile, hidden) float16, C order: a search reads its part of it
tiles.arrow     pair_id, latitude, longitude of each row; processes share its pages
shard.json      rows, maker and hashes; the shard is named by its hash
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float16, Int64, Shaped

from cvmatch.data import schema, tables
from cvmatch.data.schema import ERROR, LATITUDE, LONGITUDE, PAIR_ID
from cvmatch.index import versions

TILE_PROJ = "tile_proj"
"""Column of the parts: Matcher.tile, fp16."""

AT = "at"
"""Column of accepted tiles: their row among all rows of the parts."""

CHUNK = 65_536
"""Tiles a step: 64 MiB of tile_proj in float32 at 256 wide."""

TILES = pa.schema([schema.PAIRS.field(name) for name in (PAIR_ID, LATITUDE, LONGITUDE)])
"""What is known of each tile."""

Maker = Mapping[str, Any]
"""What made tile_proj (goes into shard.json)."""


class Store:
    """tile_proj of all tiles: arrays of shards, one behind the other."""

    def __init__(self, arrays: Sequence[Float16[np.ndarray, "_ hidden"]]) -> None:
        self.arrays = list(arrays)
        self.starts = np.cumsum([0, *(len(array) for array in arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: Int64[np.ndarray, " row"]) -> Float16[np.ndarray, "row hidden"]:
        """A copy of some rows, in their order."""
        found = np.empty((len(rows), self.arrays[0].shape[1]), np.float16)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(shard):
            own = shard == number
            found[own] = self.arrays[number][rows[own] - self.starts[number]]
        return found

    def parts(self, size: int = CHUNK) -> Iterator[Float16[np.ndarray, "_ hidden"]]:
        """All rows in their order, at most `size` at a time."""
        for array in self.arrays:
            for begin in range(0, len(array), size):
                yield array[begin : begin + size]


def accepted(parts: str, limit: float) -> tuple[pa.Table, list[dict[str, str]]]:
    """Good rows by pair_id, with their place `at` in the parts; and id and error of the others.

    Raises:
        ValueError: no good row, more than the share `limit` of the rows failed, or an id is there
            twice.
    """
    # Large strings: sorting joins all ids, and a string column of over 2 GiB cannot be.
    ids = pa.field(PAIR_ID, pa.large_string())
    columns = pa.schema([ids, *list(TILES)[1:], schema.PAIRS.field(ERROR)])
    whole = pa.concat_tables(
        _placed(table.cast(columns)) for table in tables.batches(parts, columns.names, CHUNK)
    )
    whole = whole.append_column(AT, pa.array(np.arange(len(whole))))
    bad = schema.failed_rows(whole).select([PAIR_ID, ERROR]).to_pylist()
    tiles = schema.good_rows(whole).sort_by(PAIR_ID).combine_chunks()
    if not len(tiles) or len(bad) > limit * len(whole):
        raise ValueError(
            f"build_index: of {len(whole)} rows at most {limit:.1%} may fail, but {len(bad)} did, "
            f"such as {bad[:3]}. Mend the pictures, or pass a larger --max-rejected."
        )
    if len(tiles[PAIR_ID].unique()) < len(tiles):
        counts = pa.Table.from_struct_array(tiles[PAIR_ID].value_counts())
        twice = counts.filter(pc.field("counts") > 1)["values"].to_pylist()
        raise ValueError(
            f"build_index: expected each pair_id once, got {len(twice)} again, such as "
            f"{twice[:3]}. A query finds its tile by the id: remove the copies."
        )
    return tiles.drop_columns([ERROR]), bad


def _placed(table: pa.Table) -> pa.Table:
    """With nulls for the coordinates that are NaN, as an unknown one is in an actor's arrays."""
    for name in (LATITUDE, LONGITUDE):
        known = pa.array(table[name].to_numpy(), from_pandas=True)
        table = table.set_column(table.column_names.index(name), name, known)
    return table


def gather(parts: str, at: Int64[np.ndarray, " tile"], width: int) -> Float16[np.ndarray, "tile w"]:
    """tile_proj of the rows `at` of the parts, in that order; reads only the files that hold some.

    Raises:
        ValueError: tile_proj of another width than `width`, or not finite in half precision.
    """
    tile_proj = np.empty((len(at), width), np.float16)
    order = np.argsort(at)
    wanted = at[order]
    for at_file, end, name in _files(parts):
        begin = at_file
        if np.diff(np.searchsorted(wanted, [begin, end])) == 0:
            continue
        for table in tables.batches(parts, [TILE_PROJ], CHUNK, [name]):
            first, last = np.searchsorted(wanted, [begin, begin + len(table)])
            if last > first:
                values = _matrix(table[TILE_PROJ].combine_chunks(), width)
                tile_proj[order[first:last]] = _finite(values[wanted[first:last] - begin], parts)
            begin += len(table)
    return tile_proj


def write(
    folder: str, tile_proj: Float16[np.ndarray, "tile width"], tiles: pa.Table, maker: Maker
) -> str:
    """Write a shard; gives its name."""
    os.makedirs(folder)
    np.save(os.path.join(folder, "u.npy"), tile_proj)
    # Made anew, since equal columns may have other buffers, and so other bytes, by their history.
    table = pa.table([tiles[name].to_pylist() for name in TILES.names], schema=TILES)
    with pa.ipc.new_file(os.path.join(folder, "tiles.arrow"), TILES) as file:
        file.write_table(table)
    about = {"rows": len(tiles), "maker": dict(maker), "files": versions.files_of(folder, "")}
    text = json.dumps(about, sort_keys=True)
    versions.write(os.path.join(folder, "shard.json"), text.encode())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(folder: str, rereads: bool) -> tuple[Float16[np.ndarray, "tile hidden"], pa.Table]:
    """Return tile_proj and the tiles, memory-mapped; with `rereads` for reading all of it."""
    with open(os.path.join(folder, "u.npy"), "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not rereads and hasattr(mmap, "MADV_RANDOM"):
            # Reading ahead makes a cold gather of 1,000 rows 5 times slower (index.md, section 4).
            content.madvise(mmap.MADV_RANDOM)
        tile_proj = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)
    with pa.memory_map(os.path.join(folder, "tiles.arrow")) as file:
        return tile_proj, pa.ipc.open_file(file).read_all()


def about(folder: str) -> dict[str, Any]:
    """What shard.json says."""
    with open(os.path.join(folder, "shard.json"), encoding="utf-8") as file:
        return json.load(file)


def _files(parts: str) -> Iterator[tuple[int, int, str]]:
    """Rows at which each file begins and ends, and its name."""
    begin = 0
    for name, count in zip(tables.files(parts), tables.rows(parts), strict=True):
        yield begin, begin + count, name
        begin += count


def _finite(values: np.ndarray, parts: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(
            f"build_index: tile_proj of some rows of {parts} is not finite in half precision "
            "(65,504 at most). Check the matcher's training."
        )
    return values


def _matrix(column: pa.Array, width: int) -> Shaped[np.ndarray, "row width"]:
    values = column.storage if isinstance(column, pa.ExtensionArray) else column  # Ray's tensors
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if flat.size != len(column) * width:
        raise ValueError(
            f"build_index: expected tile_proj of {width} numbers a row, as the matcher has, got "
            f"{flat.size} for {len(column)} rows. Embed the tiles with the model that is indexed."
        )
    with np.errstate(over="ignore"):  # beyond fp16: reported by the caller
        return flat.reshape(-1, width).astype(np.float16)
