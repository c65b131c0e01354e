"""Pairs -> rows with synthetic aerials and class maps, in one streaming pass that can resume.

ingest -> generate -> segment -> Parquet: each picture is read once, and lives in one node's memory
until its row is written. A row that failed stays in the output with its reason in `error`.
"""

import logging
from dataclasses import fields
from functools import partial

from ray.data import Dataset

from cvmatch.data import images, manifest, schema, storage
from cvmatch.data.pairs import PairDataset, read_pictures
from cvmatch.generate.infer import GenerateAerial, generate
from cvmatch.generate.settings import SAMPLER_VERSION, Sampling
from cvmatch.runtime import tracking
from cvmatch.runtime.streams.output_directory import OutputDirectory
from cvmatch.runtime.streams.write import Stream, StreamResult, write_stream
from cvmatch.segment.infer import SegmentAerial, segment
from cvmatch.synthesize.settings import Synthesize

OPERATORS = {
    "read": read_pictures.__name__,
    "generate": GenerateAerial.__name__,
    "segment": SegmentAerial.__name__,
    "write": "Write",
}
"""Stages that the progress shows, as `StageThroughput` takes them."""

_log = logging.getLogger(__name__)


def synthesize(config: Synthesize) -> manifest.Manifest:
    """Write the rows of `schema.SYNTHESIZED` and a manifest; returns the manifest.

    An output that is whole already is left as it is.

    Raises:
        DryRun: that is all that is asked for.
        ValueError: the data cannot be used (`PairDataset.open`), or see `write_stream`.
    """
    stream = _stream(config)
    complete = OutputDirectory(stream.output).is_complete(stream.provenance)
    if complete and not config.retry_rejected:
        return manifest.read(stream.output)  # it is no run to track
    if config.dry_run:
        write_stream(stream)
    with tracking.start("synthesize", config) as run:
        done = write_stream(stream)
        if done:
            _tell(run, done)
    return manifest.read(stream.output)


def _stream(config: Synthesize) -> Stream:
    pairs = PairDataset.open(config.data)
    models = {
        "generator": manifest.fingerprint(config.generate.model),
        "segmenter": manifest.fingerprint(config.segment.model),
    }
    return Stream(
        label="synthesize",
        output=storage.absolute(config.output).rstrip("/"),
        provenance=_provenance(config, pairs, models),
        rows=partial(_rows, config, pairs),
        total=lambda: pairs.count,
        columns=schema.SYNTHESIZED,
        pools={"generate.pool": config.generate.pool, "segment.pool": config.segment.pool},
        operators=OPERATORS,
        max_rejected=config.max_rejected,
        retry_rejected=config.retry_rejected,
        dry_run=config.dry_run,
        manifest={"config": config, "models": models, "source": config.data.root},
    )


def _rows(config: Synthesize, pairs: PairDataset) -> Dataset:
    return segment(generate(pairs.rows(), config.generate), config.segment)


def _tell(run: tracking.Run, done: StreamResult) -> None:
    if done.failed:
        _log.warning("%d of %d rows failed; see %s", done.failed, done.rows, done.rejected)
    run.metrics({"rows": done.rows, "rejected": done.failed})
    run.metrics({f"rate/{name}": stage.rate for name, stage in done.throughput.stages.items()})
    run.tag("slowest", done.throughput.slowest)


def _provenance(
    config: Synthesize, pairs: PairDataset, models: dict[str, str]
) -> dict[str, object]:
    """What the rows depend on; the number of actors and the place of the output do not count."""
    drawn, maps = config.generate, config.segment
    return {
        "models": models,
        "data": pairs.fingerprint,
        "decoder": images.PREPROCESS,
        "sampling": {part.name: getattr(drawn, part.name) for part in fields(Sampling)},
        "sampler": SAMPLER_VERSION,
        "maps": [maps.source, maps.flip],
    }
