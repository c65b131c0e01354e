"""Embedded tiles (Parquet rows) -> a shard directory of an index, and a shard into memory.

u.npy           (tile, hidden) float16, C order: memory-mapped, so that a search reads its part
tiles.parquet   row of u, pair_id, latitude, longitude; sorted by pair_id
shard.json      counts, maker and hashes; the shard is named by its hash
"""

import hashlib
import itertools
import json
import mmap
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float16, Int64, Shaped
from pyarrow import parquet

from cvmatch import schema, storage, versions
from cvmatch.schema import ERROR, LATITUDE, LONGITUDE, PAIR_ID

U = "u"
"""Column of the parts: Matcher.tile, fp16."""

CHUNK = 65_536
"""Tiles a step: 64 MiB of u in float32 at 256 wide."""

_COLUMNS = pa.schema([schema.PAIRS.field(n) for n in (PAIR_ID, LATITUDE, LONGITUDE, ERROR)])


def batches(location: str, columns: Sequence[str], rows: int = 64) -> Iterator[pa.Table]:
    """Tables of at most `rows` rows of all Parquet files of a directory, in the order of the names.

    A column that a file lacks is null.

    Raises:
        FileNotFoundError: no Parquet file there.
    """
    filesystem, path = storage.resolve(location)
    names = [name for name in storage.names(location) if name.endswith(".parquet")]
    if not names:
        raise FileNotFoundError(
            f"{location}: expected Parquet files of rows, found none. Run the job that writes them "
            "(jobs/synthesize.py) to the end, or pass another location."
        )
    for name in names:
        with filesystem.open_input_file(storage.join(path, name)) as file:
            content = parquet.ParquetFile(file)
            have = [column for column in columns if column in content.schema_arrow.names]
            for batch in content.iter_batches(rows, columns=have):
                table = pa.Table.from_batches([batch])
                for column in set(columns) - set(have):
                    table = table.append_column(column, pa.nulls(len(table)))
                yield table.select(list(columns))


def accepted(parts: str, limit: float) -> tuple[pa.Table, list[dict[str, str]]]:
    """Good rows by pair_id, with their place `at` in the parts; and id and error of the others.

    Raises:
        ValueError: no good row, more than the share `limit` of the rows failed, or an id is there
            twice.
    """
    tables = (table.cast(_COLUMNS) for table in batches(parts, _COLUMNS.names, CHUNK))
    whole = pa.concat_tables(tables)
    whole = whole.append_column("at", pa.array(np.arange(len(whole))))
    bad = whole.filter(pc.field(ERROR).is_valid()).select([PAIR_ID, ERROR]).to_pylist()
    tiles = whole.filter(pc.field(ERROR).is_null()).sort_by(PAIR_ID)
    if not len(tiles) or len(bad) > limit * len(whole):
        raise ValueError(
            f"build_index: of {len(whole)} rows at most {limit:.1%} may fail, but {len(bad)} did, "
            f"such as {bad[:3]}. Mend the pictures, or pass a larger --max-rejected."
        )
    ids = tiles[PAIR_ID].to_pylist()
    twice = [one for one, other in itertools.pairwise(ids) if one == other]
    if twice:
        raise ValueError(
            f"build_index: expected each pair_id once, got {len(twice)} again, such as "
            f"{twice[:3]}. A query finds its tile by the id: remove the copies."
        )
    return tiles.drop_columns([ERROR]), bad


def write(folder: str, parts: str, tiles: pa.Table, width: int, maker: str) -> str:
    """Write the shard of the `accepted` rows of `parts`; gives its name.

    `width`: numbers of u; `maker`: fingerprint of the matcher.

    Raises:
        ValueError: u of another width, or not finite in half precision.
    """
    os.makedirs(folder)
    _write_u(os.path.join(folder, "u.npy"), parts, tiles["at"].to_numpy(), width)
    numbered = tiles.drop_columns(["at"]).add_column(0, "row", pa.array(np.arange(len(tiles))))
    parquet.write_table(numbered, os.path.join(folder, "tiles.parquet"))
    about = {"rows": len(tiles), "maker": maker, "files": versions.files_of(folder, "")}
    text = json.dumps(about, sort_keys=True)
    versions.write(os.path.join(folder, "shard.json"), text.encode())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(folder: str, rereads: bool) -> tuple[Float16[np.ndarray, "tile hidden"], pa.Table]:
    """u, memory-mapped, and the tiles. `rereads`: u will be read whole, and not here and there."""
    with open(os.path.join(folder, "u.npy"), "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not rereads and hasattr(mmap, "MADV_RANDOM"):
            # Reading ahead makes a cold gather of 1,000 rows 5 times slower (index.md, section 4).
            content.madvise(mmap.MADV_RANDOM)
        u = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)
    return u, parquet.read_table(os.path.join(folder, "tiles.parquet"))


def _write_u(path: str, parts: str, at: Int64[np.ndarray, " tile"], width: int) -> None:
    u = np.lib.format.open_memmap(path, "w+", np.float16, (len(at), width))
    to = np.full(at.max() + 1, -1)
    to[at] = np.arange(len(at))
    begin = 0
    for table in batches(parts, [U], CHUNK):
        values = _matrix(table[U].combine_chunks(), width)
        place = to[begin : begin + len(table)]  # shorter where the last rows failed
        kept = np.flatnonzero(place >= 0)
        if not np.isfinite(values[kept]).all():
            raise ValueError(
                f"build_index: u of rows {begin} to {begin + len(table)} of {parts} is not finite "
                "in half precision (65,504 at most). Check the matcher's training."
            )
        u[place[kept]] = values[kept]
        begin += len(table)
    u.flush()


def _matrix(column: pa.Array, width: int) -> Shaped[np.ndarray, "row width"]:
    values = column.storage if isinstance(column, pa.ExtensionArray) else column  # Ray's tensors
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if flat.size != len(column) * width:
        raise ValueError(
            f"build_index: expected u of {width} numbers a row, as the matcher has, got "
            f"{flat.size} for {len(column)} rows. Embed the tiles with the model that is indexed."
        )
    with np.errstate(over="ignore"):  # beyond fp16: reported by the caller, with the rows
        return flat.reshape(-1, width).astype(np.float16)
