"""Write the rows of a stream on Ray to a directory, each once, resuming where a killed run stopped.

What the rows depend on is recorded first, the manifest comes last. Between them each row is written
once, good or with its reason in `error`; more, fewer or no good rows are an error.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig

from cvmatch.data import manifest, schema, storage
from cvmatch.runtime import lease, pools, progress, session
from cvmatch.runtime.gauges import set_gauge
from cvmatch.runtime.settings import DryRun, Pool
from cvmatch.runtime.streams.output_directory import FailureRateGuard, OutputDirectory
from cvmatch.runtime.streams.throughput import StageThroughput, call_each_step

REPORT_S = 5.0
"""Seconds between reports to Prometheus."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Rows that a job is going to write."""

    label: str
    """What the progress calls it."""
    output: str
    """Directory of the Parquet files; what is needed to resume lies beside it."""
    provenance: Mapping[str, object]
    """All that the rows depend on."""
    rows: Callable[[], Dataset]
    """Makes the rows, from a Read on; called where they can resume."""
    total: Callable[[], int]
    """Returns how many rows there are to write; called after `rows`."""
    columns: pa.Schema
    """On disk."""
    pools: Mapping[str, Pool]
    """Of actors that make the rows, by the flag that sets each."""
    operators: Mapping[str, str]
    """Stages that the progress shows, as `StageThroughput` takes them; the write is added."""
    max_rejected: float
    """Largest share of rows that may fail, in [0, 1]; never all of them."""
    retry_rejected: bool = False
    """Whether rows that failed in an earlier run are made again."""
    dry_run: bool = False
    """Whether to say only what would be done."""
    manifest: Mapping[str, Any] | None = None
    """What `manifest.write` takes beside the output and its rows; None: there is no manifest, and
    what is needed to resume stays."""


@dataclass(frozen=True)
class StreamResult:
    """What a stream has written."""

    rows: int
    """Rows, failed or not."""
    failed: int
    """Rows that failed."""
    rejected: str
    """Location of the file that names them."""
    throughput: StageThroughput
    """Rates of its stages."""


def write_stream(stream: Stream) -> StreamResult | None:
    """Write each row once. Return None where the output is complete already.

    Raises:
        DryRun: that is all that is asked for; nothing was written.
        ValueError: the output holds rows made from something else, another job writes it, the pools
            do not fit the cluster, there is no row, a row lacks or is there twice, more than
            `max_rejected` of the rows failed (at once, when so many did), or all did.
    """
    directory = OutputDirectory(stream.output)
    if directory.is_complete(stream.provenance) and not stream.retry_rejected:
        return None
    session.start()
    if stream.dry_run:
        raise DryRun(_plan(stream, directory, _prepare(stream)[1]))
    with lease.hold(stream.output) as held:
        if stream.retry_rejected and (count := directory.forget_failed()):
            _log.info("%s: %d failed rows are made again", stream.output, count)
        if directory.is_complete(stream.provenance):
            return None
        directory.begin(stream.provenance)
        return _write(stream, directory, held)


def _write(stream: Stream, directory: OutputDirectory, held: lease.Lease) -> StreamResult:
    throughput = StageThroughput({**stream.operators, "write": "Write"})
    with resume_from(directory.checkpoint_dir):
        total = _run(stream, directory, throughput, held)
    if dropped := directory.drop_copies():
        _log.warning("%s: dropped %d rows of a run that was killed", stream.output, dropped)
    directory.check_complete(total)
    directory.check_failure_rate(total, stream.max_rejected)
    directory.check_any_good()
    rejected = directory.write_rejected()
    held.check()
    result = StreamResult(directory.rows, len(directory.failed), rejected, throughput)
    if stream.manifest is not None:
        manifest.write(stream.output, rows=result.rows, **stream.manifest)
        storage.remove(directory.partial)
    return result


@contextlib.contextmanager
def resume_from(checkpoint_dir: str, column: str = schema.PAIR_ID) -> Iterator[None]:
    """Let streams of the block (Read -> ... -> Write) go on where a killed run of them stopped.

    Finished rows stay recorded, so that a finished stream that is run again does nothing.

    Args:
        checkpoint_dir: keeps the ids of written rows; must be the same next time.
        column: the unique id of a row.
    """
    context = DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        column, storage.absolute(checkpoint_dir), delete_checkpoint_on_success=False
    )
    try:
        yield
    finally:
        context.checkpoint_config = before


def _run(
    stream: Stream, directory: OutputDirectory, throughput: StageThroughput, held: lease.Lease
) -> int:
    """Run the stream to its end, or until too many rows have failed; return the rows expected."""
    rows, total = _prepare(stream)
    _log.info("%s", _plan(stream, directory, total))
    guard = FailureRateGuard(directory, total, stream.max_rejected)
    gpus = sum((pool.largest * pool.gpus for pool in stream.pools.values()), 0.0)
    report = _Report(stream.label, total, directory, throughput, progress.Estimate(total, gpus))
    filesystem, path = storage.resolve(stream.output)
    with (
        progress.watch(stream.label, total, lambda: directory.rows, throughput.summary),
        call_each_step(rows, throughput.update, guard, held, report),
    ):
        try:
            rows.write_parquet(path, filesystem=filesystem)
        except ValueError as error:
            if error not in (guard.error, held.error):
                raise
            # Ray takes the traceback from it, which would tell an error of the input from a defect.
            raise ValueError(str(error)) from None
        directory.refresh()
    report.send()
    return total


def _prepare(stream: Stream) -> tuple[Dataset, int]:
    """Check the pools; return the rows to write, none of which is made yet, and their number."""
    pools.preflight(stream.pools)
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
    return rows, total


def _plan(stream: Stream, directory: OutputDirectory, total: int) -> str:
    """Describe what a stream will do, where, and what is done already."""
    directory.refresh(running=True)  # what was written before
    lines = [f"{stream.label}: {total} rows into {stream.output}"]
    if directory.rows:
        lines.append(
            f"  done already: {directory.rows} rows, {len(directory.failed)} of them failed"
        )
    lines += [f"  {name}: {pools.describe(pool)}" for name, pool in stream.pools.items()]
    return "\n".join(lines)


@dataclass
class _Report:
    """Gauges of a running stream, every `REPORT_S` seconds; a `StepCallback`."""

    label: str
    total: int
    directory: OutputDirectory
    throughput: StageThroughput
    estimate: progress.Estimate
    next: float = 0.0

    def __call__(self, _: Any) -> None:
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + REPORT_S
            self.send()
            if text := self.estimate.update(self.directory.rows, time.monotonic()):
                _log.info("%s: %s", self.label, text)

    def send(self) -> None:
        """Set them."""
        set_gauge("cvmatch_stream_rows", self.directory.rows, stream=self.label)
        set_gauge("cvmatch_stream_rows_expected", self.total, stream=self.label)
        set_gauge("cvmatch_stream_rows_failed", len(self.directory.failed), stream=self.label)
        for name, stage in self.throughput.stages.items():
            tags = {"stream": self.label, "stage": name}
            set_gauge("cvmatch_stage_rows_per_second", stage.rate, **tags)
            set_gauge("cvmatch_stage_queued_blocks", stage.queued, **tags)
            set_gauge("cvmatch_stage_seconds", stage.busy, **tags)
