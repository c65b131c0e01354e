"""Queries with known tiles + an index -> the numbers of the retrieval protocols (DESIGN.md, 6).

Ties and NaN count against the query throughout, and deleted tiles are no part of the gallery.
Scores of queries x tiles exist a block at a time.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cvmatch.data import schema
from cvmatch.data.geography import haversine_distance
from cvmatch.index.ranking import Ranked, rank
from cvmatch.index.reader import Index
from cvmatch.match.fusion import Query
from cvmatch.nn import metrics

KS = (1, 5, 10)

_BLOCK = 2**22  # scores at a time: 16 MiB
_BEST = 10
_TIMED = 32  # queries whose time is taken


@dataclass(frozen=True)
class Found:
    """What a query level found, query by query."""

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
    near: Int64[Tensor, " query"]
    """Number of those tiles; 0 where the true tile has no coordinates."""
    distance: Float[Tensor, " query"]
    """Metres from the best tile to the true one; NaN where coordinates are missing."""
    ten: dict[str, float]
    """Shares of `metrics.one_of_ten`; empty where the gallery is too small."""


@torch.inference_mode()
def exhaustive(
    index: Index, query: Query, truth: Int64[Tensor, " query"], near_m: float, seed: int = 0
) -> Found:
    """Score every tile for every query; `truth` are rows of the index that were not deleted."""
    rows = torch.from_numpy(index.living)
    assert torch.isin(truth, rows).all(), "truth holds rows that were deleted"
    own, places = torch.searchsorted(rows, truth), positions(index)[rows]
    step = max(1, _BLOCK // len(index))
    parts = []
    for begin in range(0, len(truth), step):
        block = query.rows(slice(begin, begin + step))
        score = torch.cat([part.float().cpu() for part in index.scores(block)], dim=1)[:, rows]
        parts.append(_block(score, own[begin : begin + step], places, near_m, seed + begin))
    columns = [name for name in Found.__dataclass_fields__ if name != "ten"]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in columns}
    whole["best"] = rows[whole["best"]]
    weight = [len(part.rank) / len(truth) for part in parts]
    ten = {name: float(np.dot(weight, [part.ten[name] for part in parts])) for name in parts[0].ten}
    return Found(ten=ten, **whole)


def summary(found: Found, gallery: int, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """Numbers of the protocols; recalls with the 95 % interval of the bootstrap, in [0, 1].

    `near_recall@k_chance` is what a guess finds, each query among its own number of tiles nearby.
    """
    share, k = metrics.recall_share(0.01, found.rank, gallery)
    values = metrics.recall_at(KS, found.rank) | {"recall@1%": share, "recall@1%_k": k}
    for name, limit in [*((f"recall@{k}", k) for k in KS), ("recall@1%", k)]:
        hits = (found.rank < limit).float()
        values[f"{name}_low"], values[f"{name}_high"] = metrics.bootstrap(hits, draws, seed)
    values |= {"median_rank": metrics.median_rank(found.rank), "gallery": gallery}
    values |= {f"one_of_ten_{name}": value for name, value in found.ten.items()}
    rivals = found.near > 1  # a tile alone near its place would be found by any model
    if rivals.any():
        near = metrics.recall_at(KS, found.near_rank[rivals])
        values |= {f"near_{name}": value for name, value in near.items()}
        places = found.near[rivals].double()
        guess = {k: (k / places).clamp(max=1).mean().item() for k in KS}
        values |= {f"near_recall@{k}_chance": value for k, value in guess.items()}
        values["near_gallery"] = places.mean().item()
        values["near_queries"] = int(rivals.sum())
    known = found.distance[~found.distance.isnan()]
    if len(known):
        values |= {"distance_m": known.median().item(), "distance_m_mean": known.mean().item()}
    return values


@torch.inference_mode()
def two_stage(
    index: Index, query: Query, truth: Int64[Tensor, " query"], found: Found
) -> dict[str, float]:
    """Recall of the two-stage search, and how much of the exhaustive answer it keeps.

    A tile that the shortlist lacks is not found.
    """
    # The whole shortlist: among its ten best alone, ties with the tenth would not be seen.
    size = max(_BEST, index.manifest["shortlist"])
    places, answers = [], []
    for at, row in enumerate(truth.tolist()):
        answer = rank(index, query.rows(slice(at, at + 1)), size, "two-stage")
        places.append(_place(answer, row))
        answers.append(answer.rows[:, :_BEST])
    values = metrics.recall_at(KS, torch.tensor(places))
    best, rows = found.best.numpy(), np.concatenate(answers)
    kept = [np.isin(one, other).mean() for one, other in zip(best, rows, strict=True)]
    return values | {
        "exact_top1_kept": float((best[:, 0] == rows[:, 0]).mean()),
        "exact_top10_kept": float(np.mean(kept)),
        "shortlist": index.manifest["shortlist"],
    }


def milliseconds(index: Index, query: Query, mode: Any) -> float:
    """Median time of one query's search, in ms, after a warm-up; the query is already embedded."""
    times = []
    for at in [0, 0, *range(min(_TIMED, len(query.query_proj)))]:
        begin = time.perf_counter()
        rank(index, query.rows(slice(at, at + 1)), _BEST, mode)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]) * 1000)


def positions(index: Index) -> Float[Tensor, "tile 2"]:
    """Latitude and longitude of the tiles, in degrees; NaN where unknown."""
    columns = [index.tiles[name].to_numpy() for name in (schema.LATITUDE, schema.LONGITUDE)]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))


def _place(answer: Ranked, row: int) -> int:
    """Zero-based rank of a row in the answer to one query; behind every k where it is absent."""
    own = answer.scores[answer.rows == row]
    return int((~(answer.scores < own)).sum()) - 1 if len(own) else max(KS)


def _block(
    score: Float[Tensor, "query tile"],
    truth: Int64[Tensor, " query"],
    places: Float[Tensor, "tile 2"],
    near_m: float,
    seed: int,
) -> Found:
    best_score, best = score.topk(min(_BEST, score.shape[1]))
    there = places[truth]
    # NaN compares false: a tile without coordinates is near nothing, itself included.
    near = haversine_distance(*torch.broadcast_tensors(there[:, None], places[None])) <= near_m
    near_rank = metrics.ranks(score.masked_fill(~near, -torch.inf), truth)
    return Found(
        rank=metrics.ranks(score, truth),
        score=score.gather(1, truth[:, None])[:, 0],
        best=best,
        best_score=best_score,
        near_rank=near_rank,
        near=near.sum(dim=1),
        distance=haversine_distance(places[best[:, 0]], there),
        ten=metrics.one_of_ten(score, truth, seed=seed) if score.shape[1] >= 10 else {},
    )
