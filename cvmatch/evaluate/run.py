"""Synthesized rows of unseen pairs + an index -> the numbers of every protocol (DESIGN.md, 6).

Each modality of the ablation, north-aligned, with unknown heading and with a limited field of view,
comes from one model; so do the generator's and the segmenter's numbers from the same rows.
"""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from pyarrow import parquet
from torch import Tensor

from cvmatch.data import images, manifest, schema, storage, tables
from cvmatch.evaluate import retrieval
from cvmatch.evaluate.fid import distance
from cvmatch.evaluate.generation import Distance, generation, segmentation
from cvmatch.evaluate.settings import Evaluate
from cvmatch.index.reader import Index
from cvmatch.match.augment import limited
from cvmatch.match.fusion import Query
from cvmatch.match.model import Matcher
from cvmatch.match.settings import Modality
from cvmatch.match.task import IDS, training_ids
from cvmatch.nn import rng
from cvmatch.runtime import progress, tracking

_log = logging.getLogger(__name__)

_BATCH = 32  # rows a step


@dataclass(frozen=True)
class View:
    """How much of the panorama a query shows, and whether its heading is known."""

    fov: float
    unknown: bool

    @property
    def name(self) -> str:
        """Such as "360-north"."""
        return f"{self.fov:g}-{'unknown' if self.unknown else 'north'}"

    @property
    def whole(self) -> bool:
        """Whether it is the panorama that A and S were made from."""
        return self.fov == 360 and not self.unknown


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Measure everything, write it to `config.output`, and log a run; gives results.json.

    Rows that failed in synthesis are no queries; their number is `failed`.

    Raises:
        FileNotFoundError: no finished output of queries there.
        ValueError: all of them failed, they are of another schema version, the matcher was trained
            on some of them, or the index lacks their tiles.
    """
    manifest.read(config.queries)
    index = Index.open(config.index)
    ids = _query_ids(config.queries)
    failed = sum(tables.rows(config.queries)) - len(ids)
    if not ids:
        raise ValueError(
            f"evaluate: all {failed} rows of {config.queries} failed in synthesis, such as "
            f"{_reasons(config.queries)}. Mend what they name and run jobs/synthesize.py again."
        )
    check_unseen(ids, index.heads)
    truth = true_rows(ids, index)
    model = Matcher.load(index.heads, index.device)
    with tracking.start("evaluate", config) as run:
        queries = embedded(config, model)
        results: dict[str, Any] = {"index": _about(index), "queries": len(ids), "failed": failed}
        results["retrieval"] = {}
        parts = []
        for (view, modality), query in progress.each("search", len(queries), queries.items()):
            found = retrieval.exhaustive(index, query, truth, config.near_m, config.seed)
            numbers: dict[str, Any] = dict(
                retrieval.summary(found, len(index.living), config.bootstrap, config.seed)
            )
            if "two-stage" in config.modes:
                numbers["two-stage"] = retrieval.two_stage(index, query, truth, found)
            numbers["ms"] = {m: retrieval.milliseconds(index, query, m) for m in config.modes}
            results["retrieval"].setdefault(view.name, {})[modality] = numbers
            parts.append(_per_query(ids, index, view, modality, found))
        rows = progress.each("compare pictures", len(ids), _rows(config.queries))
        results["generation"] = generation(rows, config.bootstrap, config.seed, _distance(config))
        rows = progress.each("compare class maps", len(ids), _rows(config.queries))
        results["segmentation"] = segmentation(rows, config.num_classes)
        results = json.loads(json.dumps(results), parse_constant=lambda _: None)  # NaN, inf
        found = pa.concat_tables(parts)
        _write(config.output, results, found)
        run.metrics(flat(results))
        run.text(json.dumps(results, indent=2, sort_keys=True), "results.json")
    return results


def check_unseen(ids: list[str], model: str) -> None:
    """Refuse queries that the matcher in `model` was trained on.

    Raises:
        ValueError: names some of them and how many there are.
    """
    if not os.path.exists(os.path.join(model, IDS)):
        _log.warning("%s has no %s: it is not known what it was trained on", model, IDS)
        return
    seen = sorted(training_ids(model) & set(ids))
    if seen:
        raise ValueError(
            f"evaluate: the matcher was trained on {len(seen)} of {len(ids)} queries, such as "
            f"{seen[:3]}. Recall on training pairs says nothing: pass --queries of another split, "
            "or train without these pairs."
        )


def true_rows(ids: list[str], index: Index) -> Int64[Tensor, " query"]:
    """Row of each query's tile in the index.

    Raises:
        ValueError: the index lacks some; names them.
    """
    rows = dict(zip(index.living_ids.to_pylist(), index.living.tolist(), strict=True))
    missing = [name for name in ids if name not in rows]
    if missing:
        raise ValueError(
            f"evaluate: the index lacks the tiles of {len(missing)} of {len(ids)} queries, such as "
            f"{missing[:3]}. Build it from a gallery that holds them (--tiles.split, --splits)."
        )
    return torch.tensor([rows[name] for name in ids])


@torch.inference_mode()
def embedded(config: Evaluate, model: Matcher) -> dict[tuple[View, Modality], Query]:
    """Queries of all views and modalities; each tower sees each picture once.

    Limited views keep G alone, since A and S were made from the whole, aligned panorama.
    """
    headings = (False, True) if config.unknown_heading else (False,)
    views = [View(degrees, unknown) for degrees in config.fov for unknown in headings]
    wanted: list[tuple[View, Modality]] = [
        (v, modality) for v in views for modality in config.modalities if v.whole or modality == "G"
    ]
    parts: dict[tuple[View, Modality], list[Query]] = {key: [] for key in wanted}
    letters = set("".join(config.modalities)) - {"+"}
    device = model.device
    total = -(-sum(tables.rows(config.queries)) // _BATCH)
    for rows in progress.each("embed batches of queries", total, _batches(config.queries)):
        side = (model.config.square, model.config.square)
        _require(rows, letters)
        ground = _planes(rows[schema.GROUND], model.config.panorama).to(device)
        a = s = None
        if "A" in letters:
            a = model.aerial_features(_planes(rows[schema.SYNTHETIC], side).to(device))
        if "S" in letters:
            maps = [images.decode_ids(data, side) for data in rows[schema.SYNTHETIC_CLASSES]]
            s = model.class_features(torch.from_numpy(np.stack(maps)).to(device))
        keys = torch.tensor([rng.row_key(name) for name in rows[schema.PAIR_ID]])
        turn = rng.uniform(keys, rng.fold_in(config.seed, purpose="heading"), 1)[:, 0] * 360
        for view in views:
            g = model.ground_features(limited(ground, view.fov, turn * view.unknown))
            for _, modality in (pair for pair in wanted if pair[0] == view):
                given = {"G": g, "A": a, "S": s}
                picked = [given[x] if x in modality.split("+") else None for x in "GAS"]
                parts[view, modality].append(model.fuse(*picked))
    return {key: Query(*map(torch.cat, zip(*some, strict=True))) for key, some in parts.items()}


def flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested results by paths that MLflow takes as names."""
    found = {}
    for name, value in results.items():
        path = prefix + re.sub(r"[^\w.-]", "_", name.replace("%", "pct"))
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[path] = float(value)
    return found


def _query_ids(location: str) -> list[str]:
    return [row for rows in _batches(location, [schema.PAIR_ID]) for row in rows[schema.PAIR_ID]]


def _reasons(location: str) -> list[str]:
    for table in tables.batches(location, [schema.ERROR], 3):
        return table[schema.ERROR].to_pylist()
    return []


def _batches(location: str, columns: Iterable[str] = ()) -> Iterator[dict[str, list]]:
    """Columns of the rows without error, in one order for all readers."""
    wanted = [*(columns or schema.SYNTHESIZED.names)]
    for table in tables.batches(location, sorted({*wanted, schema.ERROR}), _BATCH):
        whole = schema.good_rows(table)
        if len(whole):
            yield whole.to_pydict()


def _distance(config: Evaluate) -> Distance | None:
    return distance(config.fid) if config.fid else None


def _rows(location: str) -> Iterator[dict[str, Any]]:
    for rows in _batches(location):
        for values in zip(*rows.values(), strict=True):
            yield dict(zip(rows, values, strict=True))


def _require(rows: dict[str, list], letters: set[str]) -> None:
    needed = {"G": schema.GROUND, "A": schema.SYNTHETIC, "S": schema.SYNTHETIC_CLASSES}
    lacking = sorted(needed[letter] for letter in {"G", *letters} if None in rows[needed[letter]])
    if lacking:
        raise ValueError(
            f"evaluate: expected {lacking} in every row, got none in some rows of "
            f"{rows[schema.PAIR_ID]}. Run jobs/synthesize.py on them, or pass --modalities G."
        )


def _planes(pictures: list[bytes], size: tuple[int, int]) -> Float[Tensor, "n 3 h w"]:
    pixels = np.stack([images.decode(data, size) for data in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _per_query(
    ids: list[str], index: Index, view: View, modality: Modality, found: retrieval.Found
) -> pa.Table:
    best = [[tile[schema.PAIR_ID] for tile in index.about(rows[:5])] for rows in found.best.numpy()]
    distance = pa.array(found.distance.numpy(), from_pandas=True)  # NaN -> null
    return pa.table(
        {
            schema.PAIR_ID: ids,
            "view": [view.name] * len(ids),
            "modality": [modality] * len(ids),
            "rank": (found.rank + 1).numpy(),
            "near_rank": pa.array((found.near_rank + 1).numpy(), mask=(found.near == 0).numpy()),
            "score": found.score.numpy(),
            "best": best,
            "best_score": found.best_score[:, :5].tolist(),
            "distance_m": distance,
        }
    )


def _about(index: Index) -> dict[str, Any]:
    names = ("version", "model", "rows", "recall", "created")
    return {name: index.manifest[name] for name in names}


def _write(output: str, results: dict[str, Any], queries: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    parquet.write_table(queries, sink)
    storage.write_bytes(storage.join(output, "queries.parquet"), sink.getvalue().to_pybytes())
    storage.write_json(storage.join(output, "results.json"), results)
