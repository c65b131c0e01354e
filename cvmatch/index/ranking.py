"""Queries -> the best tiles of an index by the exact joint score: of all, or of a shortlist."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64

from cvmatch.index.reader import EXHAUSTIVE, Index
from cvmatch.index.settings import Mode
from cvmatch.match.fusion import Query
from cvmatch.match.scoring import fastest_dtype

_SPARE = 64  # tiles that are scored again in fp32, at least


class Ranked(NamedTuple):
    """Best tiles of each query, best first."""

    rows: Int64[np.ndarray, "query k"]
    """Rows of the index; -1 behind the end, where a shortlist held fewer than k tiles."""
    scores: Float[np.ndarray, "query k"]
    """Exact joint scores, in [-1, 1]; -inf where there is no tile."""


def rank(
    index: Index,
    query: Query,
    top_k: int = 10,
    mode: Mode = "auto",
    shortlist: int = 0,
    rows: Int64[np.ndarray, " row"] | None = None,
) -> Ranked:
    """The best `top_k` tiles (or all, where there are fewer) by the exact joint score.

    exact: of all tiles. two-stage: of the `shortlist` tiles (0: the index's number) that its head
    finds nearest to the query. Equal scores are ordered by row. `rows`: only of these, and exact.
    """
    if rows is not None or mode == "exact" or (mode == "auto" and len(index) <= EXHAUSTIVE):
        return _exact(index, query, top_k, rows)
    return _two_stage(index, query, top_k, shortlist)


@torch.inference_mode()
def _exact(
    index: Index, query: Query, top_k: int, among: Int64[np.ndarray, " row"] | None = None
) -> Ranked:
    """The best of all tiles: in the type that is fastest, then in fp32 those that may be it."""
    dtype = fastest_dtype(query.query_proj.device)
    if dtype == torch.float32:
        return _sorted(*_best(index, query, top_k, dtype, among), top_k)
    rows, rough = _best(index, query, max(_SPARE, 4 * top_k), dtype, among)
    scores = _scored(index, query, rows)
    if rows.shape[1] < len(index if among is None else among):
        # A tile that was left out has a rough score of at most the least kept one. Where that could
        # hide one of the best, for all the error that was seen, fp32 decides alone.
        error = np.abs(scores - rough, where=rows >= 0, out=np.zeros_like(scores)).max(axis=1)
        unsure = np.sort(scores, axis=1)[:, -top_k] <= rough.min(axis=1) + 2 * error
        if unsure.any():
            again = query.rows(torch.from_numpy(unsure))
            count = rows.shape[1]
            rows[unsure], scores[unsure] = _best(index, again, count, torch.float32, among)
    return _sorted(rows, scores, top_k)


def _best(
    index: Index,
    query: Query,
    count: int,
    dtype: torch.dtype,
    among: Int64[np.ndarray, " row"] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the `count` best tiles (or all) by scores in `dtype`, and these; -1 and -inf where
    only deleted tiles are left."""
    best = torch.empty(len(query.query_proj), 0)
    rows = torch.empty(len(query.query_proj), 0, dtype=torch.int64)
    begin = 0
    for part in index.scores(query, dtype, among):
        best = torch.cat([best, part.cpu()], dim=1)
        rows = torch.cat(
            [rows, torch.arange(begin, begin + part.shape[1]).expand(len(best), -1)], dim=1
        )
        begin += part.shape[1]
        # Scores of half precision have many ties; fp32 scores what they leave in doubt again.
        best, rows = _top(best, rows, count, ties=dtype == torch.float32)
    found = rows.numpy() if among is None else among[rows.numpy()]
    return np.where(best.numpy() == -np.inf, -1, found), best.numpy()


def _top(
    scores: torch.Tensor, rows: torch.Tensor, count: int, ties: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best scores of each query, and their rows; `ties`: of equal ones the first."""
    best, kept = scores.topk(min(count, scores.shape[1]))
    found = rows.gather(1, kept)
    if ties:
        least = best[:, -1:]
        cut = ((scores == least).sum(1) > (best == least).sum(1)).nonzero()[:, 0]
        if len(cut):
            first = _sorted(rows[cut].numpy(), scores[cut].numpy(), best.shape[1])
            found[cut], best[cut] = torch.from_numpy(first.rows), torch.from_numpy(first.scores)
    return best, found


@torch.inference_mode()
def _two_stage(index: Index, query: Query, top_k: int, shortlist: int) -> Ranked:
    near = index.nearest(query, max(shortlist or index.manifest["shortlist"], top_k))
    return _sorted(near, _scored(index, query, near), top_k)


def _scored(index: Index, query: Query, rows: np.ndarray) -> np.ndarray:
    """Scores in fp32 of each query's own rows; -inf where there is none."""
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for at, own in enumerate(rows):
        found = own >= 0
        scores[at, found] = index.of_rows(query.rows(slice(at, at + 1)), own[found])[0].cpu()
    return scores


def _sorted(rows: np.ndarray, scores: np.ndarray, top_k: int) -> Ranked:
    order = np.lexsort((rows, -scores))[:, :top_k]
    return Ranked(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))
