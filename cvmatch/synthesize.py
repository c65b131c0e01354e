"""Pairs -> rows with synthetic aerials and class maps, in one streaming pass that can resume.

ingest -> generate -> segment -> Parquet: each picture is read once, and lives in one node's memory
until its row is written. A row that failed stays in the output with its reason in `error`.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from cvmatch import images, manifest, schema, storage, tracking
from cvmatch.generate import sampling
from cvmatch.generate.infer import Generate, GenerateAerial, generate
from cvmatch.ingest import Ingest, accepted, fingerprint, ingest, read_pictures
from cvmatch.segment.infer import Segment, SegmentAerial, segment
from cvmatch.stream import Stream, write_stream
from cvmatch.written import REJECTED, Written

OPERATORS = {
    "read": read_pictures.__name__,
    "generate": GenerateAerial.__name__,
    "segment": SegmentAerial.__name__,
    "write": "Write",
}
"""Stages that the progress shows, as `Flow` takes them."""


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
    """Write the rows of `schema.SYNTHESIZED` and a manifest; returns the manifest.

    An output that is whole already is left as it is.

    Raises:
        ValueError: the output holds rows of other data, models or settings, the data cannot be
            used (`ingest`), the pools do not fit the cluster, more than `max_rejected` of the
            rows failed (at once, when so many did), or all.
    """
    output = storage.absolute(config.output).rstrip("/")
    models = {
        "generator": manifest.fingerprint(config.generate.model),
        "segmenter": manifest.fingerprint(config.segment.model),
    }
    inputs = _made_from(config, models)
    if Written(output).claim(inputs):
        return manifest.read(output)
    with tracking.start("synthesize", config) as run:
        source = config.data.root
        flow = write_stream(
            _stream(config), output, inputs, config=config, models=models, source=source
        )
        made = manifest.read(output)
        run.metrics({"rows": made["rows"], "rejected": _count_rejected(output)})
        if flow:
            run.metrics({f"rate/{name}": stage.rate for name, stage in flow.stages.items()})
            run.tag("slowest", flow.slowest)
    return made


def _stream(config: Synthesize) -> Stream:
    data = replace(config.data, recheck=False)  # the fingerprint was of checked pictures
    return Stream(
        label="synthesize",
        rows=lambda: segment(generate(ingest(data), config.generate), config.segment),
        total=lambda: accepted(data),
        pools=(config.generate.pool, config.segment.pool),
        operators=OPERATORS,
        columns=schema.SYNTHESIZED,
        max_rejected=config.max_rejected,
    )


def _count_rejected(output: str) -> int:
    return storage.read_text(storage.join(output, REJECTED)).count("\n")


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
