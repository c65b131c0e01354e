"""The one way in which a job writes rows: a stream on Ray that resumes, checked at its end.

What the rows are made from is said first, the manifest comes last. Between them each row is written
once, good or with its reason in `error`; more, fewer or no good rows are an error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from cvmatch.data import manifest, schema, storage
from cvmatch.runtime import progress, session
from cvmatch.runtime.output_directory import Judge, Written
from cvmatch.runtime.settings import Pool
from cvmatch.runtime.throughput import Flow, each_step


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Rows that a job is going to write."""

    label: str
    """What the progress calls it."""
    output: str
    """Directory of the Parquet files; what is needed to resume lies beside it."""
    made_from: Mapping[str, Any]
    """All that the rows depend on."""
    rows: Callable[[], Dataset]
    """Makes the rows, from a Read on; called where they can resume."""
    total: Callable[[], int]
    """How many rows there are to write; called after `rows`."""
    columns: pa.Schema
    """On disk."""
    pools: Sequence[Pool]
    """Of actors that make the rows."""
    operators: Mapping[str, str]
    """Stages that the progress shows, as `Flow` takes them; the write is added."""
    max_rejected: float
    """Largest share of rows that may fail, in [0, 1]; never all of them."""
    about: Mapping[str, Any] | None = None
    """What `manifest.write` takes beside the output and its rows; None: there is no manifest, and
    what is needed to resume stays."""


@dataclass(frozen=True)
class Done:
    """What a stream has written."""

    rows: int
    """Rows, failed or not."""
    failed: int
    """Rows that failed."""
    rejected: str
    """Location of the file that names them."""
    flow: Flow
    """Rates of its stages."""


def write_stream(stream: Stream) -> Done | None:
    """Write each row once, going on where a killed run stopped; None: the output is whole already.

    Raises:
        ValueError: the output holds rows made from something else, the pools do not fit the
            cluster, there is no row, a row lacks or is there twice, more than `max_rejected` of the
            rows failed (at once, when so many did), or all did.
    """
    written = Written(stream.output)
    if written.claim(dict(stream.made_from)):
        return None
    session.start()
    flow = Flow({**stream.operators, "write": "Write"})
    with session.resumable(storage.join(written.partial, "checkpoint")):
        total = _run(stream, written, flow)
    written.require(total)
    written.judge(total, stream.max_rejected)
    written.require_good()
    done = Done(written.rows, len(written.failed), written.name_failed(), flow)
    if stream.about is not None:
        manifest.write(stream.output, rows=done.rows, **stream.about)
        storage.remove(written.partial)
    return done


def _run(stream: Stream, written: Written, flow: Flow) -> int:
    """Run the stream to its end, or until too many rows have failed; returns the rows expected."""
    session.preflight(*stream.pools)
    # In the task that writes: a column without any value has a type there again.
    rows = stream.rows().map_batches(
        schema.conform,
        fn_kwargs={"wanted": stream.columns},
        batch_format="pyarrow",
        batch_size=None,
    )
    total = stream.total()
    if not total:
        raise ValueError(f"{stream.label}: expected rows to make {stream.output} of, got none.")
    written.update(running=True)  # what was written before
    judge = Judge(written, total, stream.max_rejected)
    filesystem, path = storage.resolve(stream.output)
    with (
        progress.watch(stream.label, total, lambda: written.rows, flow.note),
        each_step(rows, flow.update, judge),
    ):
        rows.write_parquet(path, filesystem=filesystem)
        written.update()
    return total
