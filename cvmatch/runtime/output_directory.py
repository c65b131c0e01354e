"""The directory of Parquet files that a stream writes: its rows, and which of these failed."""

import itertools
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

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

FailedRow = dict[str, str]
"""`pair_id` and `reason`."""

FileCounts = tuple[int, list[FailedRow]]
"""Rows of a file, and those that failed."""

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

    def begin_or_resume(self, provenance: dict[str, object]) -> bool:
        """Record what the rows depend on. Return whether the output is complete already.

        Raises:
            ValueError: it holds rows of another provenance.
        """
        location = storage.join(self.output, PROVENANCE)
        before = storage.read_json(location) if storage.exists(location) else None
        if before not in (None, provenance) or (before is None and self._names()):
            raise ValueError(
                f"{self.output}: expected rows made from {provenance}, got rows made from "
                f"{before or 'what no file there says, as before version 2 of the rows'}. "
                f"Pass another location for the output, or delete {self.output}."
            )
        if before is None:
            storage.remove(self.partial)  # of a deleted output: it would leave out those rows
        storage.write_json(location, provenance)
        return storage.exists(storage.join(self.output, manifest.NAME))

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
        files: dict[str, FileCounts] = {}  # without those that a resumed stream deletes
        for name in self._names():
            try:
                files[name] = self._files.get(name) or _count(storage.join(self.output, name))
            except (pa.ArrowInvalid, FileNotFoundError):
                if not running:
                    raise
        self._files = files

    def _names(self) -> list[str]:
        return [name for name in storage.names(self.output) if name.endswith(".parquet")]

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
                f"{location}. Mend the cause or raise max-rejected, and delete this output, which "
                "keeps the failed rows."
            )

    def check_complete(self, total: int) -> None:
        """Check that a stream that ended wrote each of its `total` rows once.

        A worker of a run that was killed may write a moment longer, when the next run has begun to
        make the same rows (seen once, at four times as much work as cores).

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
                f"with {failed[:1]}. All are named in {location}. Mend the cause, and delete this "
                "output, which keeps the failed rows."
            )

    def write_rejected(self) -> str:
        """Write rejected.jsonl and return its location."""
        location = storage.join(self.output, REJECTED)
        storage.write_text(location, "".join(json.dumps(row) + "\n" for row in self.failed))
        return location

    def _ids(self) -> pa.ChunkedArray:
        """Return the ids of all rows, as large strings: counting joins them, maybe over 2 GiB."""
        kind = pa.large_string()
        locations = [storage.join(self.output, name) for name in self._files]
        columns = [_read(one, [schema.PAIR_ID])[schema.PAIR_ID].cast(kind) for one in locations]
        return pa.chunked_array([chunk for ids in columns for chunk in ids.chunks], kind)


class FailureRateGuard:
    """Ends a running stream as soon as more than `max_share` of its `total` rows have failed.

    A `throughput.StepCallback`.
    """

    def __init__(self, directory: OutputDirectory, total: int, max_share: float) -> None:
        self.directory, self.total, self.max_share = directory, total, max_share
        self.next = 0.0
        self.error: ValueError | None = None
        """What it raised."""

    def __call__(self, _: Any) -> None:
        """Check every `GUARD_S` seconds.

        Raises:
            ValueError: as `OutputDirectory.check_failure_rate`.
        """
        if time.monotonic() >= self.next:
            try:
                self.directory.refresh(running=True)
            except OSError as error:  # to look is no work: it is done again later
                _log.warning("%s: cannot count failed rows now: %s", self.directory.output, error)
            self.next = time.monotonic() + GUARD_S
            try:
                self.directory.check_failure_rate(self.total, self.max_share)
            except ValueError as error:
                self.error = error
                raise


def _count(location: str) -> FileCounts:
    table = _read(location, [schema.PAIR_ID, schema.ERROR])
    failed = schema.failed_rows(table).to_pylist()
    return len(table), [
        {"pair_id": row[schema.PAIR_ID], "reason": row[schema.ERROR]} for row in failed
    ]


@storage.retry_passing
def _read(location: str, columns: list[str]) -> pa.Table:
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file:
        return parquet.ParquetFile(file).read(columns=columns)
