"""The Parquet parts that a stream has written: their rows, and which of these failed."""

import itertools
import json
import time
from typing import Any

import pyarrow as pa
from pyarrow import compute, parquet

from cvmatch import manifest, schema, storage, tables

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

_IDS = 65_536  # rows whose ids are read at a time


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
        made_from = json.loads(json.dumps(made_from))  # as it is read again: no tuples
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
            ValueError: some are there twice, or lack.
        """
        counts = self._count_ids()
        twice = counts.filter(compute.field("counts") > 1)["values"].to_pylist()
        if twice:
            raise ValueError(
                f"{self.output}: expected each {schema.PAIR_ID} once, got {len(twice)} again, such "
                f"as {twice[:3]}. If what is read has them twice, remove the copies. {self._again}"
            )
        if self.rows != total:
            raise ValueError(
                f"{self.output}: expected {total} rows, got {self.rows}: some lack, or are of "
                f"another input. {self._again}"
            )

    @property
    def _again(self) -> str:
        return f"Delete {self.output} and {self.partial}, and give the command again."

    def require_good(self) -> None:
        """Check that some row has not failed.

        Raises:
            ValueError: there is no row, or all failed; they are named in rejected.jsonl.
        """
        if len(self.failed) < self.rows:
            return
        if not self.rows:
            raise ValueError(f"{self.output}: expected at least one row, got none.")
        raise ValueError(
            f"{self.output}: expected some rows that do not fail, but all {self.rows} did, such as "
            f"{self.failed[0]}. All are named in {self.name_failed()}. Mend the cause, and delete "
            "this output, which keeps the failed rows."
        )

    def _count_ids(self) -> pa.Table:
        """Returns `values` and `counts` of the pair_ids in the parts."""
        chunks: list[pa.Array] = []
        if self.rows:
            for batch in tables.batches(self.output, [schema.PAIR_ID], _IDS):
                chunks += batch[schema.PAIR_ID].chunks
        ids = pa.chunked_array(chunks, pa.string())
        return pa.Table.from_struct_array(ids.value_counts())

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
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file:
        table = parquet.ParquetFile(file).read(columns=[schema.PAIR_ID, schema.ERROR])
    failed = table.filter(compute.field(schema.ERROR).is_valid()).to_pylist()
    return len(table), [
        {"pair_id": row[schema.PAIR_ID], "reason": row[schema.ERROR]} for row in failed
    ]
