"""A data set's root and a split -> rows keyed by pair_id, with encoded pictures (`schema.PAIRS`).

The driver plans from CSVs and listings (`layouts`). A Ray Data job decodes every picture once, and
leaves `pairs.parquet` (usable rows: paths, positions), `rejected.jsonl` (the others and why) and
`ingest.json` (counts) in the cache. Streams start at a Read of `pairs.parquet`, so that Ray Data's
checkpoints can resume them, and fetch the pictures block by block.
"""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from pyarrow import fs
from ray.data import DataContext, Dataset

from cvmatch.data import images, schema, storage
from cvmatch.data.layouts import find as layouts
from cvmatch.data.layouts.listing import Listing, find_files
from cvmatch.data.layouts.rows import MISSING, Layout, Reject, Row, check_disjoint
from cvmatch.data.schema import AERIAL, CLASSES, ERROR, GROUND, LATITUDE, LONGITUDE, PAIR_ID
from cvmatch.data.settings import Ingest, PhotoSettings
from cvmatch.runtime import progress, session

FILES = {AERIAL: "aerial_file", GROUND: "ground_file", CLASSES: "classes_file"}
"""Column of the rows -> column of `pairs.parquet` with its file, relative to the data root."""

PLAN = pa.schema(
    [
        pa.field(PAIR_ID, pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in FILES.values()),  # classes_file: null where none
        pa.field(LATITUDE, pa.float64()),
        pa.field(LONGITUDE, pa.float64()),
    ]
)
"""Columns of `pairs.parquet`."""

HEADING = pa.field("heading", pa.float64())
"""Its column besides where panoramas are photos: degrees clockwise from north of their middle, or
null, where a photo says itself where it looks."""

PAIRS, REJECTED = "pairs.parquet", "rejected.jsonl"
"""Names in the cache."""

STAMP = "rejected_files"
"""Key of ingest.json: what the files of rejected rows were, so that mended ones are noticed."""

MAX_BYTES = 256 * 2**20
"""Largest picture file that is read, in bytes: above any PNG of `images.MAX_PIXELS` pixels."""

Content = tuple[bytes | None, str | None]
"""Bytes of a file, or why there are none; both None where no file is named."""

_CHECKED = 64  # rows a verify task: 0.5 s or more of decoding, against 40 ms that a task costs
_FETCHES = 8  # files a task reads at a time, so that a remote store's delays overlap
_PART = 65_536  # rows a slice of the plan, in the object store and in pairs.parquet
_FAULTS = pa.schema([(PAIR_ID, pa.string()), ("file", pa.string()), ("reason", pa.string())])

_log = logging.getLogger(__name__)


class PairDataset:
    """A split of a data set whose pictures have been checked. Make it with `PairDataset.open`."""

    def __init__(self, config: Ingest, layout: Layout, cache: str, count: int) -> None:
        self.config = config
        self.layout = layout
        self.cache = cache
        self.count = count
        """Usable rows."""

    @classmethod
    def open(cls, config: Ingest) -> "PairDataset":
        """Find the data set, and check all pictures, or take the check of an earlier run.

        It needs Ray only where pictures have to be checked.

        Raises:
            ValueError: no data set or split there, an id twice or in both splits, no usable row,
                more unusable rows than `max_rejected`, or a cache that cannot be written.
        """
        layout = layouts.find(config.root)
        cache = _cache(config, layout)
        counts = _check_split(config, layout, cache)
        return cls(config, layout, cache, counts["accepted"])

    def rows(self, pictures: Collection[str] = tuple(FILES)) -> Dataset:
        """Return the rows, with the columns of `schema.PAIRS`; of those in FILES only `pictures`.

        A row whose file has gone since the check has null there, and says so in `error`.
        """
        session.start()
        filesystem, path = storage.resolve(storage.join(self.cache, PAIRS))
        # One read task for the one file: left to itself, Ray cuts it into other blocks than are
        # asked for next, hence other batches, on which the last bits of a picture depend.
        rows = ray.data.read_parquet(path, filesystem=filesystem, override_num_blocks=1)
        rows = rows.repartition(target_num_rows_per_block=self.config.block)
        read = partial(read_pictures, root=self.layout.root, pictures=pictures)
        return rows.map_batches(read, batch_size=None, batch_format="pyarrow")

    @property
    def rejected(self) -> list[Reject]:
        """The rows that were left out, with reasons."""
        return _read_rejected(self.cache)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash (SHA-256) of ids, positions, names and sizes of pictures.

        Sizes stand for the content: a data set that is made anew at its place has others.
        """
        rows = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(self.cache, PAIRS))))
        filesystem, base = storage.resolve(self.layout.root)
        files = {file for name in FILES.values() for file in rows[name].to_pylist() if file}
        folders = sorted({f"{base}/{file}".rpartition("/")[0] for file in files})
        sizes = {
            info.path.removeprefix(f"{base}/"): info.size
            for folder in folders
            for info in filesystem.get_file_info(fs.FileSelector(folder))
        }
        listed = [sizes.get(file) for file in sorted(files)]
        return hashlib.sha256(json.dumps([rows.to_pylist(), listed]).encode()).hexdigest()


def read_pictures(rows: pa.Table, root: str, pictures: Collection[str] = tuple(FILES)) -> pa.Table:
    """Read the files of rows of PLAN below `root`, as rows of `schema.PAIRS`.

    Of the columns in FILES only `pictures`; what is wrong with the others is not seen.
    """
    columns: dict[str, pa.ChunkedArray | list] = {
        name: rows[name] for name in (PAIR_ID, LATITUDE, LONGITUDE)
    }
    errors: list[str | None] = [None] * len(rows)
    for column in pictures:
        files, contents = rows[FILES[column]].to_pylist(), _read_column(rows, root, column)
        columns[column] = [data for data, _ in contents]
        for index, (_, why) in enumerate(contents):
            if why and errors[index] is None:
                errors[index] = f"{column} {files[index]}: {why}"
    columns[ERROR] = errors
    fields = [field for field in schema.PAIRS if field.name in columns]
    return pa.table(columns, schema=pa.schema(fields))


def check_pictures(rows: pa.Table, root: str) -> pa.Table:
    """Decode the files of rows of PLAN. Return `pair_id`, `file`, `reason`: a fault, or nulls."""
    faults: list[tuple[str | None, str | None]] = [(None, None)] * len(rows)
    for column, named in FILES.items():
        files = rows[named].to_pylist()
        for index, (data, why) in enumerate(_read_column(rows, root, column)):
            reason = why if data is None else _fault(data, column)
            if reason and faults[index][0] is None:
                faults[index] = (files[index], reason)
    columns = [rows[PAIR_ID], [file for file, _ in faults], [reason for _, reason in faults]]
    return pa.table(dict(zip(_FAULTS.names, columns, strict=True)), schema=_FAULTS)


def plan(layout: Layout, rows: Iterable[Row]) -> tuple[pa.Table, list[Reject]]:
    """Return the rows whose files are there, as PLAN, and the others; open no picture."""
    listing = Listing(layout.root, renamed=not layout.photos)
    wanted = PLAN.append(HEADING) if layout.photos else PLAN
    columns: dict[str, list] = {name: [] for name in wanted.names}
    rejects: list[Reject] = []
    for row in rows:
        files = find_files(listing, row)
        if isinstance(files, dict):
            rejects.append(files)
            continue
        values = (row.pair_id, *files, *(row.position or (None, None)), row.heading)
        for name, value in zip(wanted.names, values[: len(wanted)], strict=True):
            columns[name].append(value)
    return pa.table(columns, schema=wanted), rejects


def _check_split(config: Ingest, layout: Layout, cache: str) -> dict[str, int]:
    """Leave checked rows in the cache, or take those of an earlier run; return their counts."""
    if config.split not in layout.tables:
        raise ValueError(
            f"{layout.root}: expected {layout.name_table(config.split)} beside "
            f"{list(layout.tables.values())}, got none. Add the file, or take another split."
        )
    fingerprint = _hash_inputs(config, layout)
    state = storage.join(cache, "ingest.json")
    counts = storage.read_json(state) if storage.exists(state) else {}
    fits = counts.get("fingerprint") == fingerprint
    # Where too many rows failed, the files may have been mended since: look again.
    again = fits and _share(counts) <= config.max_rejected and _has_mended(layout, cache, counts)
    if again:
        _log.info("%s: files of rejected rows have changed: all are checked again", layout.root)
    if not fits or again or _share(counts) > config.max_rejected:
        rows = layout.read_rows(config.split)
        check_disjoint(layout, config.split, rows)
        try:
            storage.write_json(state, {})  # so that nothing half-written is taken for whole
        except OSError as error:
            raise ValueError(
                f"{state}: expected a place to keep the checked rows, got {error}. Where the data "
                "set is read-only, pass a directory with this job's flag that ends in .cache."
            ) from error
        counts = _verify(layout, rows[: config.limit or None], cache, f"check {config.split}")
        kept = {"fingerprint": fingerprint, STAMP: _stamp_rejected(layout, cache), **counts}
        storage.write_json(state, kept)  # vouches for the others
    _check_rejected(config, layout.tables[config.split], cache, counts)
    return counts


def _hash_inputs(config: Ingest, layout: Layout) -> str:
    """Hash all that the cached rows depend on, but for the pictures themselves."""
    decoder = [images.PREPROCESS, images.MAX_PIXELS, MAX_BYTES]
    settings = [schema.VERSION, *decoder, config.split, config.limit]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for table in layout.sources:
        digest.update(hashlib.sha256(storage.read_bytes(table) if table else b"").digest())
    return digest.hexdigest()


def _has_mended(layout: Layout, cache: str, counts: Mapping[str, Any]) -> bool:
    """Return whether a file of a rejected row is another one than when it was checked."""
    return bool(counts["rejected"]) and counts.get(STAMP) != _stamp_rejected(layout, cache)


def _stamp_rejected(layout: Layout, cache: str) -> str:
    """Hash names, sizes and times of the files for which rows were rejected."""
    listing = Listing(layout.root, renamed=not layout.photos)
    files: set[str] = set()
    for row in _read_rejected(cache):
        with contextlib.suppress(ValueError):  # a path that leaves the root
            files |= {listing.find(row["file"] or "") or ""} - {""}
    filesystem, base = storage.resolve(layout.root)
    infos = filesystem.get_file_info([f"{base}/{file}" for file in sorted(files)])
    stamps = [[info.path, info.size, info.mtime_ns] for info in infos]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _verify(layout: Layout, rows: list[Row], cache: str, label: str) -> dict[str, int]:
    """Check all pictures and write pairs.parquet and rejected.jsonl; return the counts."""
    pairs, rejects = plan(layout, rows)
    rejects += _check(pairs, layout.root, label)
    bad = {reject[PAIR_ID] for reject in rejects}
    good = pa.array([pair_id not in bad for pair_id in pairs[PAIR_ID].to_pylist()], pa.bool_())
    pairs = pairs.filter(good)
    lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects]
    storage.write_text(storage.join(cache, REJECTED), "".join(lines))
    sink = pa.BufferOutputStream()
    pq.write_table(pairs, sink, row_group_size=_PART)
    storage.write_bytes(storage.join(cache, PAIRS), sink.getvalue().to_pybytes())
    return {"accepted": len(pairs), "rejected": len(rejects)}


def _check(pairs: pa.Table, root: str, label: str) -> list[Reject]:
    """Run `check_pictures` as Ray tasks; only verdicts come back to the driver."""
    if not len(pairs):
        return []
    session.start()
    context = DataContext.get_current()
    before, context.checkpoint_config = context.checkpoint_config, None  # for the caller's stream
    rejects, done = [], 0
    try:
        slices = [pairs.slice(start, _PART) for start in range(0, len(pairs), _PART)]
        rows = ray.data.from_arrow(slices).repartition(target_num_rows_per_block=_CHECKED)
        check = partial(check_pictures, root=root)
        verdicts = rows.map_batches(check, batch_size=None, batch_format="pyarrow")
        with progress.watch(label, len(pairs), lambda: done):
            for batch in verdicts.iter_batches(batch_size=None, batch_format="pyarrow"):
                table = cast(pa.Table, batch)
                rejects += table.filter(pc.field("reason").is_valid()).to_pylist()
                done += len(table)
    finally:
        context.checkpoint_config = before
    return rejects


def _check_rejected(config: Ingest, table: str, cache: str, counts: dict[str, int]) -> None:
    """Raise ValueError where too many rows, or all, are unusable."""
    if not counts["rejected"]:
        return
    examples = "; ".join(f"{row['file']}: {row['reason']}" for row in _read_rejected(cache)[:3])
    expected = f"at most {config.max_rejected:.1%} unusable rows, got {_share(counts):.1%}"
    if not counts["accepted"]:
        expected = "usable rows, got none: all are unusable"
    text = (
        f"{table}: expected {expected} ({counts['rejected']}), such as {examples}. "
        f"All are in {storage.join(cache, REJECTED)}."
    )
    if _share(counts) > config.max_rejected or not counts["accepted"]:
        raise ValueError(
            f"{text} Mend the files, or allow more (this job's flag of the data set that ends in "
            ".max-rejected)."
        )
    _log.warning(text)


def _read_rejected(cache: str) -> list[Reject]:
    text = storage.read_text(storage.join(cache, REJECTED))
    return [json.loads(line) for line in text.splitlines()]


def _share(counts: dict[str, int]) -> float:
    return counts["rejected"] / max(1, counts["accepted"] + counts["rejected"])


def _cache(config: Ingest, layout: Layout) -> str:
    """Return the cache's directory for this split (and limit) of this data set."""
    part = f"{config.split}-{config.limit}" if config.limit else config.split
    if not config.cache:
        return storage.join(layout.root, ".cvmatch", part)
    # Two data sets may share a cache: the same id is another picture in each.
    digest = hashlib.sha256(layout.root.encode()).hexdigest()[:8]
    return storage.join(storage.absolute(config.cache), digest, part)


def _read_column(rows: pa.Table, root: str, column: str) -> list[Content]:
    """Read the files of a column, photos as the panoramas that the models take."""
    contents = _fetch(root, rows[FILES[column]].to_pylist())
    if column != GROUND or HEADING.name not in rows.column_names:
        return contents
    headings = rows[HEADING.name].to_pylist()
    return [_make_band(*one, heading) for one, heading in zip(contents, headings, strict=True)]


def _make_band(data: bytes | None, why: str | None, heading: float | None) -> Content:
    """Return a photo as the panorama that the models take, or what is wrong with it."""
    if data is None:
        return data, why
    from cvmatch.data.photos.reading import read_photo  # noqa: PLC0415 (torch: 2 s of a read task)

    try:
        return read_photo(data, PhotoSettings(heading=heading)).data, None
    except images.BadImage as error:
        return None, str(error)


def _fetch(root: str, files: list[str | None]) -> list[Content]:
    """Read each file."""
    filesystem, base = storage.resolve(root)  # once: a connection, on a remote store
    with ThreadPoolExecutor(_FETCHES) as pool:
        read = partial(read_content, filesystem)
        paths = [file and f"{base}/{file}" for file in files]
        return [*pool.map(lambda path: read(path) if path else (None, None), paths)]


@storage.retry_passing
def read_content(filesystem: fs.FileSystem, path: str) -> Content:
    """Read a picture file, or return why its row cannot be used.

    Raises:
        OSError: the store is away; that says nothing of the file.
    """
    try:
        with filesystem.open_input_file(path) as stream:
            size = stream.size()
            if size > MAX_BYTES:
                return None, f"{size} bytes, at most {MAX_BYTES} allowed"
            return stream.read(), None
    except FileNotFoundError:
        return None, MISSING
    except OSError as error:
        if storage.is_passing(error):
            raise  # it says nothing of the file: given again, the command reads the row
        return None, f"cannot be read: {error}"


def _fault(data: bytes, column: str) -> str | None:
    """Return what is wrong with a picture, or None."""
    try:
        if column == CLASSES:
            images.check_palette(data)
        else:
            images.open_image(data)
    except images.BadImage as error:
        return str(error)
    return None
