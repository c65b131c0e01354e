"""The directory of Parquet files that a stream writes: its rows, and which of these failed."""

import functools
import io
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cvmatch.data import manifest, schema, storage

PROVENANCE = "provenance.json"
"""Beside the rows: all that they depend on."""

REJECTED = "rejected.jsonl"
"""Beside the rows: `pair_id` and `reason` of each failed row."""

GUARD_S = 5.0
"""Seconds between counts of the failed rows of a running stream."""

READERS = 16
"""Files that are read at a time: a store answers after a tenth of a second."""

FailedRow = dict[str, str]
"""`pair_id` and `reason`."""

FileCounts = tuple[int, list[FailedRow]]
"""Rows of a file, and those that failed."""

T = TypeVar("T")

_RETRY = (
    "Mend the cause and give the command again with --retry-rejected (where it has no such flag, "
    "delete this output, which keeps the failed rows)"
)

_PENDING = ".pending.parquet"  # of Ray Data: ids whose file may be incomplete, so it is made again

_log = logging.getLogger(__name__)


def read_provenance(output: str) -> Mapping[str, object]:
    """Return what finished rows depend on; where no stream wrote them, the manifest's models.

    Raises:
        FileNotFoundError: the rows have no manifest, so they are not finished.
        ValueError: the manifest is of another version.
    """
    models = manifest.read(output)["models"]
    location = storage.join(output, PROVENANCE)
    return storage.read_json(location) if storage.exists(location) else models


class OutputDirectory:
    """What is in the files of the directory `output` so far; each file is read once."""

    def __init__(self, output: str) -> None:
        self.output = output
        self._files: dict[str, FileCounts] = {}
        self._refreshing = threading.Lock()

    @property
    def partial(self) -> str:
        """Directory of what an unfinished output needs to resume.

        It lies beside the output, whose readers take every Parquet file in it.
        """
        return f"{self.output}.partial"

    @property
    def checkpoint_dir(self) -> str:
        """Directory in which Ray Data keeps the ids of written rows."""
        return storage.join(self.partial, "checkpoint")

    def is_complete(self, provenance: Mapping[str, object]) -> bool:
        """Return whether all rows are there already; changes nothing.

        Raises:
            ValueError: it holds rows of another provenance.
        """
        before, provenance = self._provenance(), json.loads(json.dumps(provenance))
        if before not in (None, provenance) or (before is None and self._names()):
            raise ValueError(
                f"{self.output}: expected rows made from {provenance}, got rows made from "
                f"{before or 'what no file there says, as before version 2 of the rows'}. "
                f"Pass another location for the output, or delete {self.output}."
            )
        return storage.exists(storage.join(self.output, manifest.NAME))

    def begin(self, provenance: Mapping[str, object]) -> None:
        """Record what the rows depend on."""
        if self._provenance() is None:
            storage.remove(self.partial)  # of a deleted output: it would leave out those rows
        storage.write_json(storage.join(self.output, PROVENANCE), provenance)

    def _provenance(self) -> object:
        location = storage.join(self.output, PROVENANCE)
        return storage.read_json(location) if storage.exists(location) else None

    @property
    def rows(self) -> int:
        """Rows, failed or not."""
        return sum(rows for rows, _ in self._files.values())

    @property
    def failed(self) -> list[FailedRow]:
        """The failed rows."""
        return list(itertools.chain.from_iterable(failed for _, failed in self._files.values()))

    def refresh(self, running: bool = False) -> None:
        """Read new files; with `running`, skip those that are still being written.

        Raises:
            pyarrow.ArrowInvalid: a file is cut off, and the stream does not run.
        """
        with self._refreshing:  # an older look must not take the place of a newer one
            names = self._names()
            new = [name for name in names if name not in self._files]
            counts = self._map(functools.partial(_count, running=running), new)
            found = {name: count for name, count in zip(new, counts, strict=True) if count}
            known = self._files | found
            # Without those that a resumed stream has deleted.
            self._files = {name: known[name] for name in names if name in known}

    def _map(self, function: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """Return `function` of the location of each file: many at a time, as stores answer late."""
        locations = [storage.join(self.output, name) for name in names]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(function, locations))

    def _names(self) -> list[str]:
        return storage.list_files(self.output, ".parquet")

    def check_failure_rate(self, total: int, max_share: float) -> None:
        """Check how many rows failed.

        Raises:
            ValueError: more than `max_share` of `total`; they are named in rejected.jsonl.
        """
        failed = self.failed
        if len(failed) > max_share * total:
            location = self.write_rejected()
            raise ValueError(
                f"{self.output}: expected at most {max_share:.0%} of {total} rows to fail, got "
                f"{len(failed)} among the first {self.rows}, such as {failed[0]}. All are named in "
                f"{location}. {_RETRY}, or raise max-rejected."
            )

    def check_complete(self, total: int) -> None:
        """Check that a stream that ended wrote each of its `total` rows once.

        Raises:
            ValueError: there are more rows, or fewer, or a `pair_id` is there twice.
        """
        counts = pa.Table.from_struct_array(self._ids().value_counts())
        if self.rows != total or len(counts) != total:
            twice = counts.filter(pc.field("counts") > 1)["values"]
            such = f" (such as {twice[:3].to_pylist()})" if len(twice) else ""
            raise ValueError(
                f"{self.output}: expected {total} rows, got {self.rows}: of {len(counts)} ids, "
                f"some are there twice{such}, or lack. Delete it and {self.partial}, and give the "
                "command again; if the source itself holds an id twice, remove its copies first."
            )

    def drop_copies(self) -> int:
        """Delete rows that two runs wrote, from all files but one; return how many.

        A worker of a run that was killed may write a moment longer, when the next run has begun to
        make the same rows. Their files bear other names; rows that one run wrote twice stay.
        """
        counts = pa.Table.from_struct_array(self._ids().value_counts())
        twice = set(counts.filter(pc.field("counts") > 1)["values"].to_pylist())
        writers: dict[str, str] = {}
        dropped = 0
        # Files without failed rows first: a good row is better than a failed one.
        for name in sorted(self._files, key=lambda name: (len(self._files[name][1]), name)):
            if not twice:
                break
            writer = name.partition("_")[0]
            keep = [
                pair_id not in twice or writers.setdefault(pair_id, writer) == writer
                for pair_id in self._read(name, schema.PAIR_ID)
            ]
            dropped += len(keep) - sum(keep)
            self._keep_rows(name, keep)
        return dropped

    def forget_failed(self) -> int:
        """Take the failed rows out, so that the next run makes them again; return how many.

        The manifest goes first: an output that lacks rows is not complete.
        """
        self.refresh(running=True)
        failed = [row["pair_id"] for row in self.failed]
        if not failed:
            return 0
        self._keep_finished(failed)
        storage.remove(storage.join(self.output, manifest.NAME))
        for name, (_, rows) in list(self._files.items()):
            if rows:
                errors = schema.read_errors(self._read(name, schema.ERROR))
                self._keep_rows(name, [error is None for error in errors])
        return len(failed)

    def check_any_good(self) -> None:
        """Check that not all rows of a stream that ended have failed.

        Raises:
            ValueError: all have; they are named in rejected.jsonl.
        """
        failed = self.failed
        if len(failed) == self.rows:
            location = self.write_rejected()
            raise ValueError(
                f"{self.output}: expected some good rows, but all {self.rows} failed, the first "
                f"with {failed[:1]}. All are named in {location}. {_RETRY}."
            )

    def _read(self, name: str, column: str) -> list[Any]:
        return _read(storage.join(self.output, name), [column])[column].to_pylist()

    def _keep_rows(self, name: str, keep: Sequence[bool]) -> None:
        """Write a file again with some of its rows, or delete it where it would have none."""
        if all(keep):
            return
        location = storage.join(self.output, name)
        if any(keep):
            sink = io.BytesIO()
            parquet.write_table(_read(location).filter(pa.array(keep)), sink)
            storage.write_bytes(location, sink.getvalue())
            self._files[name] = _count(location) or (0, [])
        else:
            storage.remove(location)
            del self._files[name]

    def _keep_finished(self, failed: list[str]) -> None:
        """Make the next run go on with all but the failed rows."""
        names = storage.names(self.checkpoint_dir)
        if not names:  # the output was complete
            ids = pa.table({schema.PAIR_ID: self._ids().cast(pa.string())})
            self._write_finished("finished.parquet", ids, failed)
        for name in names:
            if not name.endswith(_PENDING):
                ids = _read(storage.join(self.checkpoint_dir, name))
                self._write_finished(name, ids, failed)

    def _write_finished(self, name: str, ids: pa.Table, failed: list[str]) -> None:
        kept = ids.filter(~pc.field(schema.PAIR_ID).isin(failed))
        sink = io.BytesIO()
        parquet.write_table(kept, sink)
        storage.write_bytes(storage.join(self.checkpoint_dir, name), sink.getvalue())

    def write_rejected(self) -> str:
        """Write rejected.jsonl and return its location."""
        location = storage.join(self.output, REJECTED)
        storage.write_text(location, "".join(json.dumps(row) + "\n" for row in self.failed))
        return location

    def _ids(self) -> pa.ChunkedArray:
        """Return the ids of all rows, as large strings: counting joins them, maybe over 2 GiB."""
        kind = pa.large_string()
        tables = self._map(functools.partial(_read, columns=[schema.PAIR_ID]), list(self._files))
        columns = [table[schema.PAIR_ID].cast(kind) for table in tables]
        return pa.chunked_array([chunk for ids in columns for chunk in ids.chunks], kind)


class FailureRateGuard:
    """Ends a running stream as soon as more than `max_share` of its `total` rows have failed.

    A `throughput.StepCallback`.
    """

    def __init__(self, directory: OutputDirectory, total: int, max_share: float) -> None:
        self.directory, self.total, self.max_share = directory, total, max_share
        self.next = 0.0
        self.thread: threading.Thread | None = None
        self.error: ValueError | None = None
        """What it raised."""

    def __call__(self, _: Any) -> None:
        """Check what the last count found, and count again every `GUARD_S` seconds.

        Raises:
            ValueError: as `OutputDirectory.check_failure_rate`.
        """
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + GUARD_S
        try:
            self.directory.check_failure_rate(self.total, self.max_share)
        except ValueError as error:
            self.error = error
            raise
        if not (self.thread and self.thread.is_alive()):  # else a store answers slowly
            self.thread = threading.Thread(target=self._count, daemon=True)
            self.thread.start()

    def _count(self) -> None:
        try:
            self.directory.refresh(running=True)
        except OSError as error:  # to look is no work: it is done again later
            _log.warning("%s: cannot count failed rows now: %s", self.directory.output, error)


def _count(location: str, running: bool = False) -> FileCounts | None:
    """Count the rows of a file; None where it is still being written, or gone."""
    try:
        table = _read(location, [schema.PAIR_ID, schema.ERROR])
    except (pa.ArrowInvalid, FileNotFoundError):
        if running:
            return None
        raise
    failed = schema.failed_rows(table).to_pylist()
    return len(table), [
        {"pair_id": row[schema.PAIR_ID], "reason": row[schema.ERROR]} for row in failed
    ]


@storage.retry_passing
def _read(location: str, columns: list[str] | None = None) -> pa.Table:
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file:
        return parquet.ParquetFile(file).read(columns=columns)
