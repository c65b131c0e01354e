"""Queries with known tiles + an index -> the numbers of the retrieval protocols.

Ties and NaN count against the query throughout, and deleted tiles are no part of the gallery.
Scores of queries x tiles exist a block at a time.
"""

import dataclasses
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cvmatch.data import schema
from cvmatch.data.geography import haversine_distance
from cvmatch.evaluate.results import (
    Difference,
    DistanceResult,
    NearResult,
    Recall,
    RetrievalResult,
    TwoStageResult,
)
from cvmatch.index.reader import Index, TopTiles, rank
from cvmatch.nn import geometry, metrics

KS = (1, 5, 10)
"""Lengths of the lists of answers whose recall is measured."""

WITHIN_M = (25, 50, 100)
"""Metres within which a first answer may count as found."""

_BLOCK = 2**22  # scores at a time: 16 MiB
_BEST = 10
_TIMED = 32  # queries whose time is taken


@dataclass(frozen=True)
class Ranking:
    """What each query of one view and modality found."""

    rank: Int64[Tensor, " query"]
    """Zero-based rank of the true tile in the whole gallery."""
    score: Float[Tensor, " query"]
    """Score of the true tile."""
    best: Int64[Tensor, "query best"]
    """Rows of the index of the ten best tiles, or of all where there are fewer."""
    best_score: Float[Tensor, "query best"]
    """Their scores."""
    near_rank: Int64[Tensor, " query"]
    """Zero-based rank among the tiles near the true one, itself included."""
    near_count: Int64[Tensor, " query"]
    """Number of those tiles; 0 where the true tile has no coordinates."""
    distance_m: Float[Tensor, " query"]
    """Metres from the best tile to the true one; NaN where coordinates are missing."""
    heading_index: Int64[Tensor, " query"]
    """Which of the tried headings the best tile was found with; 0 where none were tried."""
    one_of_ten: dict[str, float]
    """Shares of `metrics.one_of_ten`; empty where the gallery is too small."""


@torch.inference_mode()
def search_exactly(
    index: Index,
    query: Float[Tensor, "query *heading width"],
    truth: Int64[Tensor, " query"],
    near_m: float,
    seed: int = 0,
) -> Ranking:
    """Score every tile for every query, and rank the true ones.

    Args:
        index: the gallery.
        query: embedded queries; of one with several vectors, the best for a tile counts.
        truth: rows of the index, none of them deleted.
        near_m: radius of the near gallery around the true tile, in metres.
        seed: of the random galleries of ten.
    """
    rows = torch.from_numpy(index.live_rows)
    assert torch.isin(truth, rows).all(), "truth holds rows that were deleted"
    positions, coordinates = torch.searchsorted(rows, truth), read_coordinates(index)[rows]
    step = max(1, _BLOCK // (len(index) * query[0].shape[:-1].numel()))
    blocks = []
    for begin in range(0, len(truth), step):
        score, heading = _score_block(index, query[begin : begin + step], rows)
        true = positions[begin : begin + step]
        ranking = _rank_block(score, true, coordinates, near_m, seed + begin)
        found = heading.gather(1, ranking.best[:, :1])[:, 0]
        blocks.append(dataclasses.replace(ranking, heading_index=found))
    names = [name for name in Ranking.__dataclass_fields__ if name != "one_of_ten"]
    columns = {name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
    columns["best"] = rows[columns["best"]]
    weight = [len(block.rank) / len(truth) for block in blocks]
    one_of_ten = {
        name: float(np.dot(weight, [block.one_of_ten[name] for block in blocks]))
        for name in blocks[0].one_of_ten
    }
    return Ranking(one_of_ten=one_of_ten, **columns)


def _score_block(
    index: Index, query: Float[Tensor, "query *heading width"], rows: Int64[Tensor, " tile"]
) -> tuple[Float[Tensor, "query tile"], Int64[Tensor, "query tile"]]:
    """Return the score of each query and each of some tiles, and with which vector."""
    flat = query.flatten(0, -2)
    score = torch.cat([part.float().cpu() for part in index.iter_scores(flat)], dim=1)[:, rows]
    best = score.reshape(len(query), -1, len(rows)).max(dim=1)
    return best.values, best.indices


def summarize(
    ranking: Ranking, gallery: int, resamples: int = 1000, seed: int = 0
) -> RetrievalResult:
    """Return the numbers of the protocols; recalls with the 95 % interval of the bootstrap.

    Args:
        ranking: what the queries found.
        gallery: number of tiles that were searched.
        resamples: of the bootstrap.
        seed: of the resamples.
    """
    share, share_k = metrics.recall_share(0.01, ranking.rank, gallery)
    values = metrics.recall_at(KS, ranking.rank) | {"recall@1%": share}
    recalls = {}
    for (name, value), k in zip(values.items(), (*KS, share_k), strict=True):
        hits = (ranking.rank < k).float()
        low, high = metrics.bootstrap(hits, resamples, seed)
        recalls[name] = Recall(
            value=value, low=low, high=high, k=share_k if name == "recall@1%" else None
        )
    return RetrievalResult(
        gallery=gallery,
        recalls=recalls,
        median_rank=metrics.median_rank(ranking.rank),
        one_of_ten=ranking.one_of_ten,
        near=_summarize_near(ranking),
        distance=_summarize_distance(ranking.distance_m[~ranking.distance_m.isnan()]),
    )


def _summarize_distance(metres: Float[Tensor, " query"]) -> DistanceResult | None:
    if not len(metres):
        return None
    return DistanceResult(
        within={f"{most}m": (metres <= most).double().mean().item() for most in WITHIN_M},
        median=metres.median().item(),
        p90=metres.double().quantile(0.9).item(),
        mean=metres.mean().item(),
    )


def measure_heading_error(
    ranking: Ranking, true_headings: Float[Tensor, " query"], count: int
) -> float:
    """Return the median error, in degrees, of the heading with which a first answer was found.

    Args:
        ranking: what queries found, with `count` tried headings.
        true_headings: the headings that the queries look along, in degrees.
        count: number of headings.
    """
    found = torch.tensor(geometry.tried(count))[ranking.heading_index]
    return ((found - true_headings + 180) % 360 - 180).abs().median().item()


def compare_first(
    ranking: Ranking, other: Ranking, resamples: int = 1000, seed: int = 0
) -> Difference:
    """Return how much more often the true tile comes first than in another ranking."""
    gain = (ranking.rank == 0).float() - (other.rank == 0).float()
    low, high = metrics.bootstrap(gain, resamples, seed)
    return Difference(value=gain.mean().item(), low=low, high=high)


@torch.inference_mode()
def compare_two_stage(
    index: Index,
    query: Float[Tensor, "query width"],
    truth: Int64[Tensor, " query"],
    exact: Ranking,
) -> TwoStageResult:
    """Measure the two-stage search, and how much of the `exact` answers it keeps."""
    # The whole shortlist: among its ten best alone, ties with the tenth would not be seen.
    size = max(_BEST, index.manifest.shortlist)
    ranks, answers = [], []
    for number, row in enumerate(truth.tolist()):
        answer = rank(index, query[number : number + 1], size, "two-stage")
        ranks.append(_rank_in_answer(answer, row))
        answers.append(answer.rows[:, :_BEST])
    best, rows = exact.best.numpy(), np.concatenate(answers)
    kept = [np.isin(first, second).mean() for first, second in zip(best, rows, strict=True)]
    return TwoStageResult(
        recalls=metrics.recall_at(KS, torch.tensor(ranks)),
        exact_top1_kept=float((best[:, 0] == rows[:, 0]).mean()),
        exact_top10_kept=float(np.mean(kept)),
        shortlist=index.manifest.shortlist,
    )


def measure_latency(
    index: Index, query: Float[Tensor, "query width"], mode: Literal["exact", "two-stage"]
) -> float:
    """Return the median milliseconds of one embedded query's search, after a warm-up."""
    times = []
    for number in [0, 0, *range(min(_TIMED, len(query)))]:
        begin = time.perf_counter()
        rank(index, query[number : number + 1], _BEST, mode)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]) * 1000)


def read_coordinates(index: Index) -> Float[Tensor, "tile 2"]:
    """Return latitude and longitude of the tiles, in degrees; NaN where unknown."""
    columns = [index.tiles[name].to_numpy() for name in (schema.LATITUDE, schema.LONGITUDE)]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))


def _rank_in_answer(answer: TopTiles, row: int) -> int:
    """Return the zero-based rank of a row in the answer to one query; absent: behind every k."""
    score = answer.scores[answer.rows == row]
    return int((~(answer.scores < score)).sum()) - 1 if len(score) else max(KS)


def _rank_block(
    score: Float[Tensor, "query tile"],
    truth: Int64[Tensor, " query"],
    coordinates: Float[Tensor, "tile 2"],
    near_m: float,
    seed: int,
) -> Ranking:
    best_score, best = score.topk(min(_BEST, score.shape[1]))
    true = coordinates[truth]
    # NaN compares false: a tile without coordinates is near nothing, itself included.
    distance = haversine_distance(*torch.broadcast_tensors(true[:, None], coordinates[None]))
    near = distance <= near_m
    near_rank = metrics.ranks(score.masked_fill(~near, -torch.inf), truth)
    return Ranking(
        rank=metrics.ranks(score, truth),
        score=score.gather(1, truth[:, None])[:, 0],
        best=best,
        best_score=best_score,
        near_rank=near_rank,
        near_count=near.sum(dim=1),
        distance_m=haversine_distance(coordinates[best[:, 0]], true),
        heading_index=torch.zeros_like(truth),
        one_of_ten=metrics.one_of_ten(score, truth, seed=seed) if score.shape[1] >= 10 else {},
    )


def _summarize_near(ranking: Ranking) -> NearResult | None:
    crowded = ranking.near_count > 1  # a tile without neighbours would be found by any model
    if not crowded.any():
        return None
    gallery = ranking.near_count[crowded].double()
    return NearResult(
        recalls=metrics.recall_at(KS, ranking.near_rank[crowded]),
        chance={f"recall@{k}": (k / gallery).clamp(max=1).mean().item() for k in KS},
        gallery=gallery.mean().item(),
        queries=int(crowded.sum()),
    )
