"""Validation rows -> vectors of their queries and tiles -> ranks in the gallery of all of them.

`match.task` embeds a batch at a time; the training loop gathers the vectors of all workers. Nothing
here depends on batches or on the number of workers.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cvmatch.match.augment import TowerInputs
from cvmatch.match.heads.branches import BranchHeads, fit_shares
from cvmatch.match.heads.joint import JointHeads, JointScorer
from cvmatch.match.model import Matcher
from cvmatch.nn import metrics

QUERY, TILE = "query/", "tile/"
"""Names of the vectors begin with these; what compares them follows."""

FITTED_PAIRS, FITTED_TILES = 256, 1024
"""Pairs at most, and tiles among which they are to be found, that weights of branches are fitted on
in a validation (two seconds of a core)."""

TIE = 1e-6
"""Scores that differ by less are equal, which counts against the query: the last bits of a row of a
matrix product depend on its place, so that equal tiles would be ranked at random."""

_BLOCK = 512
"""Queries that are ranked at a time."""


def pad(batch: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Repeat the last row until there are `rows`; what has no axes stays as it is."""
    missing = rows - len(batch["key"])
    return {
        name: torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])
        if value.ndim and missing > 0
        else value
        for name, value in batch.items()
    }


def embed(model: Matcher, inputs: TowerInputs) -> dict[str, Float[Tensor, "row _"]]:
    """Embed queries and tiles: a vector of each branch, or those of a joint score."""
    query = model.query_features(inputs.ground, inputs.synthetic, inputs.synthetic_mask)
    tile = model.tile_features(inputs.aerial)
    heads = model.heads
    if isinstance(heads, JointHeads):
        alone = heads.fuse(query.ground, None, None).embedding
        queries = {"direct": alone.float(), "joint": heads.embed_queries(query)}
        tiles = {"joint": heads.embed_tiles(tile)}
    else:
        queries, tiles = heads.query_parts(query), heads.tile_parts(tile)
    return _prefix(QUERY, queries) | _prefix(TILE, tiles)


class EmbeddedPairs:
    """Vectors of pairs, and the scores of each query and each tile."""

    def __init__(self, heads: BranchHeads | JointHeads, vectors: Mapping[str, Tensor]) -> None:
        """`vectors`: of `embed`, of all rows."""
        self.queries, self.tiles = _select(QUERY, vectors), _select(TILE, vectors)
        self.joint = JointScorer(heads) if isinstance(heads, JointHeads) else None
        if self.joint is not None:
            self.tiles["direct"] = self.tiles["joint"][:, : self.joint.shortlist_width]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(next(iter(self.tiles.values())))

    @torch.no_grad()
    def scores(
        self, name: str, queries: slice | Tensor, tiles: slice | Tensor
    ) -> Float[Tensor, "query tile"]:
        """Score some queries and some tiles by a branch, or by `joint`."""
        query, tile = self.queries[name][queries], self.tiles[name][tiles]
        if name == "joint" and self.joint is not None:
            return self.joint(query, tile)
        return query @ tile.T


def rank(pairs: EmbeddedPairs) -> dict[str, float]:
    """Return mean reciprocal rank (`mrr`) and `recall_at_1` of each query's tile among all.

    Of queries with all the pictures there are; and of each branch alone, as `mrr_direct`.
    """
    if pairs.joint is not None:
        ranks = {"": _rank(pairs, {"joint": 1.0}), "_direct": _rank(pairs, {"direct": 1.0})}
    else:
        ranks = {f"_{name}": _rank(pairs, {name: 1.0}) for name in pairs.queries}
        ranks[""] = _rank_sum(pairs) if len(pairs.queries) > 1 else next(iter(ranks.values()))
    values: dict[str, float] = {}
    for name, rank in ranks.items():
        values[f"mrr{name}"] = metrics.mean_reciprocal_rank(rank)
        values[f"recall_at_1{name}"] = metrics.recall_at([1], rank)["recall@1"]
    return values


def _rank_sum(pairs: EmbeddedPairs) -> Int64[Tensor, " pair"]:
    """Rank by the sum of the branches' scores.

    Its weights are fitted, as those of the published model are (a training's temperatures say
    nothing of a branch that is not trained): on one half of the pairs for the queries of the other.
    """
    every = torch.arange(len(pairs))
    halves = every[::2], every[1::2]
    ranks = torch.empty(len(pairs), dtype=torch.int64)
    for half, other in (halves, halves[::-1]):
        ranks[half] = _rank(pairs, _fit(pairs, other), half)
    return ranks


def _fit(pairs: EmbeddedPairs, chosen: Int64[Tensor, " pair"]) -> dict[str, float]:
    """Fit weights of the branches on some pairs, among their tiles."""
    if not len(chosen):
        return dict.fromkeys(pairs.queries, 1.0)
    queries, tiles = chosen[:FITTED_PAIRS], chosen[:FITTED_TILES]
    return fit_shares({name: pairs.scores(name, queries, tiles) for name in pairs.queries})[0]


def _rank(
    pairs: EmbeddedPairs,
    weights: Mapping[str, float],
    queries: Int64[Tensor, " query"] | None = None,
) -> Int64[Tensor, " query"]:
    """Rank the tiles of some queries, or of all, among all tiles by a weighted sum of scores."""
    queries = torch.arange(len(pairs)) if queries is None else queries
    return torch.cat([*_rank_blocks(pairs, weights, queries)])


def _rank_blocks(
    pairs: EmbeddedPairs, weights: Mapping[str, float], queries: Tensor
) -> Iterator[Tensor]:
    for block in queries.split(_BLOCK):
        scores = [w * pairs.scores(name, block, slice(None)) for name, w in weights.items()]
        total = torch.stack(scores).sum(0)
        truth = block.to(total.device)
        total[torch.arange(len(block)), truth] -= TIE
        yield metrics.ranks(total, truth).cpu()


def _prefix(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _select(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
