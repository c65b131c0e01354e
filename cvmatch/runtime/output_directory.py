"""The Parquet parts that a stream has written: their rows, and which of these failed."""

import itertools
import json
import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cvmatch.data import manifest, schema, storage

SOURCE = "source.json"
"""Beside the parts: what they are made from."""

REJECTED = "rejected.jsonl"
"""Beside the parts: `pair_id` and `reason` of each failed row."""

LOOK_S = 5.0
"""Seconds between looks at the parts of a running stream."""

Failed = dict[str, str]
"""`pair_id` and `reason`."""

Part = tuple[int, list[Failed]]
"""Rows of a part, and those that failed."""


def made_from(output: str) -> dict[str, Any]:
    """What finished rows were made from; where no stream wrote them, the models in their manifest.

    Raises:
        FileNotFoundError, ValueError: as `manifest.read`.
    """
    models = manifest.read(output)["models"]
    place = storage.join(output, SOURCE)
    return storage.read_json(place) if storage.exists(place) else models


class Written:
    """What is in the parts of the directory `output` so far; each part is read once."""

    def __init__(self, output: str) -> None:
        self.output = output
        self._parts: dict[str, Part] = {}

    @property
    def partial(self) -> str:
        """Directory for what an unfinished output needs to resume.

        Beside the output, whose readers take every Parquet file in it.
        """
        return f"{self.output}.partial"

    def claim(self, made_from: dict[str, Any]) -> bool:
        """Say what the output is being made from; True where it is whole already.

        Raises:
            ValueError: it holds rows that were made from something else.
        """
        place = storage.join(self.output, SOURCE)
        before = storage.read_json(place) if storage.exists(place) else None
        if before not in (None, made_from) or (before is None and self._names()):
            raise ValueError(
                f"{self.output}: expected rows made from {made_from}, got rows made from {before}. "
                f"Pass another location for the output, or delete {self.output}."
            )
        if before is None:
            storage.remove(self.partial)  # of a deleted output: it would leave out those rows
        storage.write_json(place, made_from)
        return storage.exists(storage.join(self.output, manifest.NAME))

    @property
    def rows(self) -> int:
        """Rows, failed or not."""
        return sum(rows for rows, _ in self._parts.values())

    @property
    def failed(self) -> list[Failed]:
        """The failed rows."""
        return list(itertools.chain.from_iterable(failed for _, failed in self._parts.values()))

    def update(self, running: bool = False) -> None:
        """Read the parts that are new; `running`: but for those that are being written.

        Raises:
            pyarrow.ArrowInvalid: one is not whole.
        """
        found: dict[str, Part] = {}  # without those that a resumed stream deletes, half recorded
        for name in self._names():
            try:
                found[name] = self._parts.get(name) or _read(storage.join(self.output, name))
            except (pa.ArrowInvalid, FileNotFoundError):
                if not running:
                    raise
        self._parts = found

    def _names(self) -> list[str]:
        return [name for name in storage.names(self.output) if name.endswith(".parquet")]

    def judge(self, total: int, max_share: float) -> None:
        """Check how many rows failed.

        Raises:
            ValueError: more than `max_share` of `total`; they are named in rejected.jsonl.
        """
        failed = self.failed
        if len(failed) > max_share * total:
            place = self.name_failed()
            raise ValueError(
                f"{self.output}: expected at most {max_share:.0%} of {total} rows to fail, got "
                f"{len(failed)} among the first {self.rows}, such as {failed[0]}. All are named in "
                f"{place}. Mend the cause or raise max-rejected, and delete this output, which "
                "keeps the failed rows."
            )

    def require(self, total: int) -> None:
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

    def require_good(self) -> None:
        """Check that not all rows of a stream that ended have failed.

        Raises:
            ValueError: all have; they are named in rejected.jsonl.
        """
        failed = self.failed
        if len(failed) == self.rows:
            place = self.name_failed()
            raise ValueError(
                f"{self.output}: expected some good rows, but all {self.rows} failed, the first "
                f"with {failed[:1]}. All are named in {place}. Mend the cause, and delete this "
                "output, which keeps the failed rows."
            )

    def _ids(self) -> pa.ChunkedArray:
        """Ids of all rows. As large strings: to count them joins them, beyond 2 GiB perhaps."""
        kind = pa.large_string()
        places = [storage.join(self.output, name) for name in self._parts]
        found = [_table(place, [schema.PAIR_ID])[schema.PAIR_ID].cast(kind) for place in places]
        return pa.chunked_array([chunk for ids in found for chunk in ids.chunks], kind)

    def name_failed(self) -> str:
        """Write rejected.jsonl; gives its location."""
        place = storage.join(self.output, REJECTED)
        storage.write_text(place, "".join(json.dumps(row) + "\n" for row in self.failed))
        return place


class Judge:
    """Ends a running stream as soon as more than `max_share` of its `total` rows have failed.

    A `flow.Step`.
    """

    def __init__(self, written: Written, total: int, max_share: float) -> None:
        self.written, self.total, self.max_share = written, total, max_share
        self.next = 0.0

    def __call__(self, _: Any) -> None:
        """Look every `LOOK_S` seconds. Raises ValueError, as `Written.judge`."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + LOOK_S
            self.written.update(running=True)
            self.written.judge(self.total, self.max_share)


def _read(location: str) -> Part:
    table = _table(location, [schema.PAIR_ID, schema.ERROR])
    failed = schema.failed_rows(table).to_pylist()
    return len(table), [
        {"pair_id": row[schema.PAIR_ID], "reason": row[schema.ERROR]} for row in failed
    ]


def _table(location: str, columns: list[str]) -> pa.Table:
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file:
        return parquet.ParquetFile(file).read(columns=columns)
