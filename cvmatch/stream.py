"""The one way in which a stream of rows becomes a directory of Parquet files."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from cvmatch import engine, manifest, progress, schema, storage
from cvmatch.engine import Pool
from cvmatch.flow import Flow, each_step
from cvmatch.written import Judge, Written

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A pass over rows by pools of actors, whose results are written."""

    label: str
    """What the progress calls it."""
    rows: Callable[[], Dataset]
    """Makes the lazy rows, keyed by `pair_id`, with an `error`; a plan Read -> ... -> Write."""
    total: Callable[[], int]
    """Counts the rows that it reads; called after `rows`."""
    pools: Sequence[Pool]
    """All pools that it holds at once."""
    operators: Mapping[str, str]
    """Stages that the progress shows, as `Flow` takes them, but for the write."""
    columns: pa.Schema
    """Columns to write; others that the rows have are written as they are."""
    max_rejected: float
    """Largest share of rows, in [0, 1], that may fail."""


def write_stream(
    stream: Stream,
    output: str,
    inputs: Mapping[str, Any],
    *,
    config: Any,
    models: Mapping[str, str],
    source: str,
) -> Flow | None:
    """Write each row once, then the names of the failed ones, then the manifest.

    A pass that was killed goes on where it stopped. `inputs` is all that the rows depend on;
    `config`, `models` and `source` go to the manifest (`manifest.write`).

    Returns:
        What the stages did; None where the output is whole already, which is left as it is.

    Raises:
        ValueError: the output holds rows made from other inputs, the pools do not fit the cluster,
            more than the allowed share of the rows failed (at once, when so many did), all failed,
            there is none, or some are twice in the output or lack.
    """
    written = Written(output)
    if written.claim(dict(inputs)):
        return None
    engine.start()
    flow = Flow({**stream.operators, "write": "Write"})
    with engine.resumable(storage.join(written.partial, "checkpoint")):
        total = _run(stream, written, flow)
    written.require(total)
    written.judge(total, stream.max_rejected)
    written.require_good()
    place = written.name_failed()
    if written.failed:
        _log.warning("%d of %d rows failed; see %s", len(written.failed), total, place)
    manifest.write(output, rows=total, config=config, models=models, source=source)
    storage.remove(written.partial)
    return flow


def _run(stream: Stream, written: Written, flow: Flow) -> int:
    """Run the pass to its end, or until too many rows have failed; returns the number of rows."""
    engine.preflight(*stream.pools)
    typed: Any = functools.partial(_conform, wanted=stream.columns)
    rows = stream.rows().map_batches(typed, batch_format="pyarrow", batch_size=None)
    total = stream.total()
    written.update(running=True)  # what was written before
    judge = Judge(written, total, stream.max_rejected)
    filesystem, path = storage.resolve(storage.make_directory(written.output))
    with (
        progress.watch(stream.label, total, lambda: written.rows, flow.note),
        each_step(rows, flow.update, judge),
    ):
        rows.write_parquet(path, filesystem=filesystem)
    written.update()
    return total


def _conform(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    """The columns of `wanted`, typed, and behind them the others."""
    typed = schema.conform(table, wanted)
    for name in table.column_names:
        if name not in wanted.names:
            typed = typed.append_column(name, table[name])
    return typed
