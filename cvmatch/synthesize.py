"""Pairs -> rows with synthetic aerials and class maps, in one streaming pass that can resume.

ingest -> generate -> segment -> Parquet: each picture is read once, and lives in one node's memory
until its row is written. A row that failed stays in the output with its reason in `error`.
"""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from pyarrow import parquet

from cvmatch import engine, manifest, progress, schema, shard, storage, tracking
from cvmatch.generate.infer import Generate, generate
from cvmatch.ingest import Ingest, accepted, ingest
from cvmatch.segment.infer import Segment, segment

REJECTED = "rejected.jsonl"
SOURCE = "source.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Synthesize:
    """Draw and segment the synthetic aerial of every pair."""

    data: Ingest = field(default_factory=Ingest)
    """Pairs."""
    generate: Generate = field(default_factory=Generate)
    """The generator and its actors."""
    segment: Segment = field(default_factory=Segment)
    """The segmenter and its actors."""
    output: str = "data/synthesized/train"
    """URI of the directory of rows; the same command goes on where a killed one stopped."""
    max_rejected: float = 0.05
    """Largest share of rows that may fail, in [0, 1]."""


def synthesize(config: Synthesize) -> dict[str, Any]:
    """Write the rows of `schema.SYNTHESIZED` and a manifest; gives the manifest.

    An output that is whole already is left as it is.

    Raises:
        ValueError: the output holds rows of other models or settings, the pools do not fit the
            cluster, or more than `max_rejected` of the rows failed.
    """
    output = storage.absolute(config.output).rstrip("/")
    partial = f"{output}.partial"  # beside the output, whose readers take every Parquet file in it
    models = {
        "generator": manifest.fingerprint(config.generate.model),
        "segmenter": manifest.fingerprint(config.segment.model),
    }
    if _claim(output, partial, _made_from(config, models)):
        return manifest.read(output)
    engine.start()
    with tracking.start("synthesize", config) as run:
        with engine.resumable(storage.join(partial, "checkpoint")):
            engine.preflight(config.generate.pool, config.segment.pool)
            rows = segment(generate(ingest(config.data), config.generate), config.segment)
            rows = rows.map_batches(schema.conform, batch_format="pyarrow", batch_size=None)
            filesystem, path = storage.resolve(output)
            with progress.watch("synthesize", accepted(config.data), lambda: _written(output)):
                rows.write_parquet(path, filesystem=filesystem)
        rejected = _reject(output, config.max_rejected)
        written = _written(output)
        manifest.write(output, rows=written, config=config, models=models, source=config.data.root)
        storage.remove(partial)
        run.metrics({"rows": written, "rejected": rejected})
    return manifest.read(output)


def _made_from(config: Synthesize, models: dict[str, str]) -> dict[str, Any]:
    """What the rows depend on; the number of actors and the place of the output do not count."""
    asked = config.generate
    return {
        "models": models,
        "root": storage.absolute(config.data.root),
        "split": config.data.split,
        "limit": config.data.limit,
        "sampling": [asked.steps, asked.guidance, asked.seed],
    }


def _claim(output: str, partial: str, made_from: dict[str, Any]) -> bool:
    """Say what the output is being made from; True where it is whole already.

    Raises:
        ValueError: it holds rows that were made from something else.
    """
    place = storage.join(output, SOURCE)
    before = storage.read_json(place) if storage.exists(place) else None
    if before not in (None, made_from) or (before is None and _written(output)):
        raise ValueError(
            f"{output}: expected rows made from {made_from}, got rows made from {before}. "
            f"Pass another --output, or delete {output}."
        )
    if before is None:
        storage.remove(partial)  # of an output that was deleted: it would leave out those rows
    storage.write_json(place, made_from)
    return storage.exists(storage.join(output, manifest.NAME))


def _reject(output: str, max_share: float) -> int:
    """Name the failed rows in rejected.jsonl; gives their number."""
    lines, total = [], 0
    for table in shard.batches(output, [schema.PAIR_ID, schema.ERROR]):
        total += len(table)
        failed = table.filter(table[schema.ERROR].is_valid()).to_pylist()
        lines += [{"pair_id": row[schema.PAIR_ID], "reason": row[schema.ERROR]} for row in failed]
    place = storage.join(output, REJECTED)
    storage.write_text(place, "".join(json.dumps(line) + "\n" for line in lines))
    if len(lines) > max_share * total:
        raise ValueError(
            f"{output}: expected at most {max_share:.0%} of {total} rows to fail, got "
            f"{len(lines)}; the first: {lines[0]}. All are named in {place}. Mend the pictures or "
            "raise --max-rejected, and delete this output, which keeps the failed rows."
        )
    if lines:
        _log.warning("%d of %d rows failed; see %s", len(lines), total, place)
    return len(lines)


def _written(output: str) -> int:
    """Rows of the finished parts, from their footers."""
    filesystem, path = storage.resolve(output)
    rows = 0
    for name in storage.names(output):
        if name.endswith(".parquet"):
            with filesystem.open_input_file(f"{path}/{name}") as file:
                rows += parquet.ParquetFile(file).metadata.num_rows
    return rows
