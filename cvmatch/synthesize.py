"""Pairs -> rows with synthetic aerials and class maps, in one streaming pass that can resume.

ingest -> generate -> segment -> Parquet: each picture is read once, and lives in one node's memory
until its row is written. A row that failed stays in the output with its reason in `error`.
"""

import logging
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cvmatch import engine, images, manifest, progress, schema, storage, tracking
from cvmatch.flow import Flow, each_step
from cvmatch.generate import sampling
from cvmatch.generate.infer import Generate, GenerateAerial, generate
from cvmatch.ingest import Ingest, accepted, fingerprint, ingest, read_pictures
from cvmatch.segment.infer import Segment, SegmentAerial, segment
from cvmatch.written import Judge, Written

OPERATORS = {
    "read": read_pictures.__name__,
    "generate": GenerateAerial.__name__,
    "segment": SegmentAerial.__name__,
    "write": "Write",
}
"""Stages that the progress shows, as `Flow` takes them."""

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
        ValueError: the output holds rows of other data, models or settings, the data cannot be
            used (`ingest`), the pools do not fit the cluster, or more than `max_rejected` of the
            rows failed (at once, when so many did).
    """
    output = storage.absolute(config.output).rstrip("/")
    written, flow = Written(output), Flow(OPERATORS)
    models = {
        "generator": manifest.fingerprint(config.generate.model),
        "segmenter": manifest.fingerprint(config.segment.model),
    }
    if written.claim(_made_from(config, models)):
        return manifest.read(output)
    engine.start()
    with tracking.start("synthesize", config) as run:
        with engine.resumable(storage.join(written.partial, "checkpoint")):
            _stream(config, written, flow)
        written.require(accepted(config.data))
        written.judge(written.rows, config.max_rejected)
        place = written.name_failed()
        if written.failed:
            _log.warning("%d of %d rows failed; see %s", len(written.failed), written.rows, place)
        manifest.write(
            output, rows=written.rows, config=config, models=models, source=config.data.root
        )
        storage.remove(written.partial)
        run.metrics({"rows": written.rows, "rejected": len(written.failed)})
        run.metrics({f"rate/{name}": stage.rate for name, stage in flow.stages.items()})
        run.tag("slowest", flow.slowest)
    return manifest.read(output)


def _stream(config: Synthesize, written: Written, flow: Flow) -> None:
    """Run the pass to its end, or until too many rows have failed."""
    engine.preflight(config.generate.pool, config.segment.pool)
    rows = ingest(replace(config.data, recheck=False))  # the fingerprint was of checked pictures
    rows = segment(generate(rows, config.generate), config.segment)
    rows = rows.map_batches(schema.conform, batch_format="pyarrow", batch_size=None)
    total = accepted(config.data)
    written.update(running=True)  # what was written before
    judge = Judge(written, total, config.max_rejected)
    filesystem, path = storage.resolve(written.output)
    with (
        progress.watch("synthesize", total, lambda: written.rows, flow.note),
        each_step(rows, flow.update, judge),
    ):
        rows.write_parquet(path, filesystem=filesystem)
        written.update()


def _made_from(config: Synthesize, models: dict[str, str]) -> dict[str, Any]:
    """What the rows depend on; the number of actors and the place of the output do not count."""
    drawn, maps = config.generate, config.segment
    return {
        "models": models,
        "data": fingerprint(config.data),
        "decoder": images.PREPROCESS,
        "sampling": {part.name: getattr(drawn, part.name) for part in fields(sampling.Sampling)},
        "sampler": sampling.VERSION,
        "maps": [maps.source, maps.flip, maps.tile, maps.overlap],
    }
