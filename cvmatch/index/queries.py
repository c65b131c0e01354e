"""Synthesized rows -> embedded queries: some to measure a shortlist, others to distil it from."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from cvmatch.data import manifest, schema, storage, tables
from cvmatch.generate.settings import Sampling
from cvmatch.index.shard import CHUNK
from cvmatch.match.fusion import Query
from cvmatch.match.infer import EMBEDDING, QUERY_PROJ, EmbedQuery
from cvmatch.match.model import read_config
from cvmatch.match.settings import Modality
from cvmatch.runtime import hardware

DISTIL = 1_000
"""Queries at most from which a head is distilled."""

_MODALITIES = ("G", "G+A", "G+A+S")

SAMPLING = tuple(field.name for field in fields(Sampling) if field.name != "seed")
"""Settings of the generator that queries of one index should share."""


@dataclass(frozen=True)
class Queries:
    """Embedded queries."""

    measure: Query
    """Of the fullest modality that the model knows."""
    distil: Query
    """Others, of all modalities in turns; where there are no others, the same."""
    made_by: dict[str, Any]
    """Fingerprints of the `generator` and `segmenter` that made the rows, and its settings
    of SAMPLING; what is not known is not there."""


def split_queries(location: str, model: str, sample: int, seed: int) -> Queries | None:
    """Some of the rows at `location`, embedded in this process; None where that is empty.

    Raises:
        ValueError: no row has the pictures that the model's queries consist of.
    """
    if not location:
        return None
    modalities: tuple[Modality, ...] = ("G",) if read_config(model).ground_only else _MODALITIES
    columns = [schema.PAIR_ID, schema.ERROR]
    ids = [
        pair_id
        for table in tables.batches(location, columns, CHUNK)
        for pair_id in schema.good_rows(table)[schema.PAIR_ID].to_pylist()
    ]
    drawn = np.random.default_rng(seed).permutation(ids).tolist()
    others = drawn[sample : sample + DISTIL]
    measure = _embedded(location, model, modalities[-1], drawn[:sample])
    parts = [
        _embedded(location, model, modality, others[at :: len(modalities)])
        for at, modality in enumerate(modalities)
        if len(others) >= len(modalities)
    ]
    distil = Query(*map(torch.cat, zip(*parts, strict=True))) if parts else measure
    return Queries(measure, distil, _made_by(location))


def _made_by(location: str) -> dict[str, Any]:
    if not storage.exists(storage.join(location, manifest.NAME)):
        return {}
    about = manifest.read(location)
    sampling = about["config"].get("generate", {})
    return about["models"] | {name: sampling[name] for name in SAMPLING if name in sampling}


def _embedded(location: str, model: str, modality: Modality, ids: list[str]) -> Query:
    names = {"G": schema.GROUND, "A": schema.SYNTHETIC, "S": schema.SYNTHETIC_CLASSES}
    pictures = [names[letter] for letter in modality.split("+")]
    columns = [schema.PAIR_ID, *pictures, schema.ERROR]
    embed, parts = EmbedQuery(model, modality), []
    for table in tables.batches(location, columns):
        rows = table.filter(pc.field(schema.PAIR_ID).isin(ids))
        parts.append(embed({name: rows[name].to_numpy() for name in columns}))
    errors = [error for part in parts for error in schema.read_errors(part[schema.ERROR])]
    good = np.array([error is None for error in errors], dtype=bool)
    if not good.any():
        raise ValueError(
            f"build_index: expected {pictures} in some rows of {location}, got none. "
            "Run jobs/synthesize.py on them, or leave --queries out."
        )
    found = (
        np.concatenate([part[name] for part in parts])[good] for name in (EMBEDDING, QUERY_PROJ)
    )
    return Query(*(torch.from_numpy(value).to(hardware.device()) for value in found))
