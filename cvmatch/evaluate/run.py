"""Synthesized rows of unseen pairs + an index -> the numbers of every protocol.

Each modality of the ablation, north-aligned, with unknown heading and with a limited field of view,
comes from one model; so do the generator's and the segmenter's numbers from the same rows.
"""

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from pyarrow import parquet
from torch import Tensor

from cvmatch.data import manifest, schema, storage, tables
from cvmatch.evaluate import retrieval
from cvmatch.evaluate.fid import build_fid
from cvmatch.evaluate.generation import measure_generation, measure_segmentation
from cvmatch.evaluate.queries import (
    QueryView,
    draw_headings,
    embed_queries,
    read_batches,
    read_errors,
    read_query_ids,
)
from cvmatch.evaluate.results import FILE, IndexSummary, Results, RetrievalResult
from cvmatch.evaluate.settings import Evaluate
from cvmatch.index.reader import Index
from cvmatch.match.model import Matcher
from cvmatch.match.settings import Modality
from cvmatch.match.task import IDS, read_training, read_training_ids
from cvmatch.runtime import hardware, progress, tracking

QUERIES_FILE = "queries.parquet"
"""Name of the file with a row for each query, view and modality."""

_Row = dict[str, bytes | str | float | None]
"""A row of `schema.SYNTHESIZED`."""

_log = logging.getLogger(__name__)


def evaluate(config: Evaluate) -> Results:
    """Measure everything, write it to `config.output`, and log a run.

    Rows that failed in synthesis are skipped and counted in `Results.failed`.

    Raises:
        FileNotFoundError: there is no finished output of synthesis at `config.queries`.
        ValueError: all of its rows failed, they are of another schema version, the matcher was
            trained on some of them, or the index lacks their tiles.
    """
    manifest.read(config.queries)
    index = Index.open(config.index)
    ids = read_query_ids(config.queries)
    failed = sum(tables.rows(config.queries)) - len(ids)
    if not ids:
        raise ValueError(
            f"evaluate: all {failed} rows of {config.queries} failed in synthesis, such as "
            f"{read_errors(config.queries)}. Mend what they name and run cvmatch synthesize again."
        )
    check_unseen(ids, index.matcher_dir)
    truth = find_true_rows(ids, index)
    hardware.keep_freed_memory()
    model = Matcher.load(index.matcher_dir, index.device)
    with tracking.start("evaluate", config) as run:
        queries = embed_queries(config, model)
        by_view: dict[str, dict[str, RetrievalResult]] = {}
        rankings = []
        alone: dict[str, retrieval.Ranking] = {}
        for (view, modality), query in progress.each("search", len(queries), queries.items()):
            result, ranking = _measure_retrieval(config, index, query, truth)
            if query.ndim == 3:
                error = retrieval.measure_heading_error(
                    ranking, draw_headings(ids, config.seed), config.headings
                )
                result = replace(result, heading_error=error)
            alone |= {view.name: ranking} if modality == "G" else {}
            if modality != "G" and view.name in alone:
                minus_g = retrieval.compare_first(
                    ranking, alone[view.name], config.bootstrap, config.seed
                )
                result = replace(result, minus_g=minus_g)
            by_view.setdefault(view.name, {})[modality] = result
            rankings.append(_ranking_table(ids, index, view, modality, ranking))
        results = Results(
            index=_summarize_index(index),
            queries=len(ids),
            failed=failed,
            retrieval=by_view,
            generation=measure_generation(
                progress.each("compare pictures", len(ids), _read_rows(config.queries)),
                config.bootstrap,
                config.seed,
                build_fid(config.fid) if config.fid else None,
            ),
            segmentation=measure_segmentation(
                progress.each("compare class maps", len(ids), _read_rows(config.queries)),
                config.num_classes,
            ),
        )
        _write_table(storage.join(config.output, QUERIES_FILE), pa.concat_tables(rankings))
        results.write(config.output)
        tree = results.to_json()
        run.metrics(flatten_numbers(tree))
        run.text(json.dumps(tree, indent=2, sort_keys=True), FILE)
    return results


def check_unseen(ids: list[str], model: str) -> None:
    """Refuse queries that the matcher in the directory `model` was trained on.

    Raises:
        ValueError: names some of them and how many there are.
    """
    if not os.path.exists(os.path.join(model, IDS)):
        _log.warning(
            "%s has no %s (trained on: %s): queries that it was trained on cannot be refused",
            model,
            IDS,
            read_training(model).get("data", "not known"),
        )
        return
    seen = sorted(read_training_ids(model) & set(ids))
    if seen:
        raise ValueError(
            f"evaluate: the matcher was trained on {len(seen)} of {len(ids)} queries, such as "
            f"{seen[:3]}. Recall on training pairs says nothing: pass --queries of another split, "
            "or train without these pairs."
        )


def find_true_rows(ids: list[str], index: Index) -> Int64[Tensor, " query"]:
    """Return the row of each query's tile in the index.

    Raises:
        ValueError: the index lacks some; names them.
    """
    rows = dict(zip(index.live_ids.to_pylist(), index.live_rows.tolist(), strict=True))
    missing = [name for name in ids if name not in rows]
    if missing:
        raise ValueError(
            f"evaluate: the index lacks the tiles of {len(missing)} of {len(ids)} queries, such as "
            f"{missing[:3]}. Build it from a gallery that holds them (--tiles.split, --splits)."
        )
    return torch.tensor([rows[name] for name in ids])


def flatten_numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of nested results by paths that MLflow takes as names."""
    numbers = {}
    for name, value in tree.items():
        path = prefix + re.sub(r"[^\w.-]", "_", name.replace("%", "pct"))
        if isinstance(value, Mapping):
            numbers |= flatten_numbers(value, f"{path}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers[path] = float(value)
    return numbers


def _measure_retrieval(
    config: Evaluate,
    index: Index,
    query: Float[Tensor, "query *heading width"],
    truth: Int64[Tensor, " query"],
) -> tuple[RetrievalResult, retrieval.Ranking]:
    ranking = retrieval.search_exactly(index, query, truth, config.near_m, config.seed)
    result = retrieval.summarize(ranking, len(index.live_rows), config.bootstrap, config.seed)
    if query.ndim == 3:  # modes are timed and compared for one vector a query
        return result, ranking
    if "two-stage" in config.modes:
        two_stage = retrieval.compare_two_stage(index, query, truth, ranking)
        result = replace(result, two_stage=two_stage)
    ms = {mode: retrieval.measure_latency(index, query, mode) for mode in config.modes}
    return replace(result, ms=ms), ranking


def _read_rows(location: str) -> Iterator[_Row]:
    for rows in read_batches(location):
        for values in zip(*rows.values(), strict=True):
            yield dict(zip(rows, values, strict=True))


def _ranking_table(
    ids: list[str], index: Index, view: QueryView, modality: Modality, ranking: retrieval.Ranking
) -> pa.Table:
    best = [[tile["pair_id"] for tile in index.describe(rows[:5])] for rows in ranking.best.numpy()]
    lone = (ranking.near_count == 0).numpy()
    return pa.table(
        {
            schema.PAIR_ID: ids,
            "view": [view.name] * len(ids),
            "modality": [modality] * len(ids),
            "rank": (ranking.rank + 1).numpy(),
            "near_rank": pa.array((ranking.near_rank + 1).numpy(), mask=lone),
            "score": ranking.score.numpy(),
            "best": best,
            "best_score": ranking.best_score[:, :5].tolist(),
            "distance_m": pa.array(ranking.distance_m.numpy(), from_pandas=True),  # NaN -> null
        }
    )


def _summarize_index(index: Index) -> IndexSummary:
    names = ("version", "model", "rows", "recall", "created")
    plain: Any = index.manifest.plain()
    return IndexSummary(**{name: plain[name] for name in names})


def _write_table(location: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    storage.write_bytes(location, sink.getvalue().to_pybytes())
