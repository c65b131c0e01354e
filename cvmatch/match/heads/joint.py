"""The published form of the score: one cosine, of a query and of a candidate that has its A.

`candidate = FFN_C([a; c])` uses the *query's* synthetic aerial, so a tile has no embedding of its
own. FFN_C's first layer is linear, hence W1 [a; c] + b1 = (W1c c) + (W1a a + b1) = tile_proj +
query_proj: a tile keeps `tile_proj`, a query computes `query_proj` once, and a pair costs two small
layers. Exact, and ~10^5 times faster than running the towers for each pair.

A vector of a tile is its embedding under the null synthetic aerial, then its `tile_proj`; that of a
query its embedding, then its `query_proj`. The product of the first halves is the score of a query
of modality G, and the shortlist of all others.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cvmatch.match.heads.branches import Features, ResidualMLP
from cvmatch.runtime import hardware

CHUNK = {"cpu": 2048, "cuda": 65_536}
"""Tiles that a joint score takes at a time (docs/decisions.md#scoring-in-chunks)."""


class Query(NamedTuple):
    """What scoring needs of each query, whatever the number of tiles."""

    embedding: Float[Tensor, "query hidden"]
    """FFN_G([g; a; s]), unit norm."""
    query_proj: Float[Tensor, "query hidden"]
    """W1a a + b1: the query's half of FFN_C's first layer."""


class JointHeads(nn.Module):
    """FFN_G, FFN_C, and learned nulls that stand in for an absent g, a or s.

    Args:
        ground: Width of g.
        aerial: Width of a, and of c.
        mask: Width of s.
        hidden: Width of the heads.
    """

    def __init__(self, ground: int, aerial: int, mask: int, hidden: int) -> None:
        super().__init__()
        self.null_ground = nn.Parameter(torch.zeros(ground))
        self.null_synthetic = nn.Parameter(torch.zeros(aerial))
        self.null_mask = nn.Parameter(torch.zeros(mask))
        self.query_linear = nn.Linear(ground + aerial + mask, hidden)
        self.query_mlp = ResidualMLP(hidden)
        self.tile_linear = nn.Linear(aerial, hidden, bias=False)  # W1c
        self.query_aerial_linear = nn.Linear(aerial, hidden)  # W1a, b1
        self.candidate_mlp = ResidualMLP(hidden)
        # As ControlNet does with new inputs: training starts from G alone.
        nn.init.zeros_(self.query_aerial_linear.weight)
        self.query_linear.weight.data[:, ground:] = 0

    @property
    def hidden(self) -> int:
        """Width of the embeddings, of tile_proj and of query_proj."""
        return self.tile_linear.out_features

    def embed_tiles(self, tiles: Features) -> Float[Tensor, "tile 2*{self.hidden}"]:
        """Return the vectors of tiles: `shortlist_embedding`, then `tile_proj`."""
        assert tiles.aerial is not None
        tile_proj = self.tile_linear(tiles.aerial)
        return torch.cat([self.shortlist_embedding(tile_proj), tile_proj], dim=1).float()

    def embed_queries(self, queries: Features) -> Float[Tensor, "query 2*{self.hidden}"]:
        """Return the vectors of queries: `embedding`, then `query_proj`."""
        return torch.cat(self.fuse(queries.ground, queries.aerial, queries.mask), dim=1).float()

    def split(self, vectors: Float[Tensor, "query both"]) -> Query:
        """Return the parts of queries' vectors."""
        return Query(vectors[:, : self.hidden], vectors[:, self.hidden :])

    def fuse(
        self,
        ground: Float[Tensor, "query g"] | None,
        synthetic: Float[Tensor, "query a"] | None,
        mask: Float[Tensor, "query s"] | None,
    ) -> Query:
        """Fuse tower features to a query; None stands for the learned null.

        Raises:
            ValueError: all three are None.
        """
        features = [feature for feature in (ground, synthetic, mask) if feature is not None]
        if not features:
            raise ValueError(
                "matcher: a query needs at least one of ground, synthetic and synthetic_mask, got "
                "none. Pass a picture."
            )
        count = len(features[0])
        g = self.null_ground.expand(count, -1) if ground is None else ground
        a = self.null_synthetic.expand(count, -1) if synthetic is None else synthetic
        s = self.null_mask.expand(count, -1) if mask is None else mask
        embedding = self.query_mlp(self.query_linear(torch.cat([g, a, s], dim=1)))
        return Query(embedding, self.query_aerial_linear(a))

    def candidate_embedding(
        self,
        tile_proj: Float[Tensor, "*#pair hidden"],
        query_proj: Float[Tensor, "*#pair hidden"],
    ) -> Float[Tensor, "*pair hidden"]:
        """Return FFN_C([a; c]) of pairs, unit norm, from its two halves."""
        return self.candidate_mlp(tile_proj + query_proj)

    def pair_scores(
        self, query: Query, tile_proj: Float[Tensor, "tile hidden"]
    ) -> Float[Tensor, "query tile"]:
        """Score each query and tile by cosine, the tile embedded with that query's own A.

        All pairs at once, with gradient; `JointScorer` is for many tiles.
        """
        candidate = self.candidate_embedding(tile_proj[None], query.query_proj[:, None])
        return (candidate.float() * query.embedding[:, None].float()).sum(-1)

    def shortlist_embedding(
        self, tile_proj: Float[Tensor, "tile hidden"]
    ) -> Float[Tensor, "tile hidden"]:
        """Embed a tile under the null synthetic aerial (unit norm).

        Its product with a query of modality G is that modality's exact score.
        """
        query_proj = self.query_aerial_linear(self.null_synthetic)
        return self.candidate_embedding(tile_proj, query_proj.expand(len(tile_proj), -1))


class JointScorer:
    """The published form: every query against every tile, embedded with that query's own A.

    Equal to FFN_C([a; c]) but for rounding: 1e-6 in fp32.
    """

    def __init__(self, heads: JointHeads) -> None:
        self.heads = heads
        self.width, self.shortlist_width = 2 * heads.hidden, heads.hidden

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.heads.null_ground.device

    @torch.no_grad()
    def __call__(
        self,
        query: Float[Tensor, "query width"],
        tile: Float[Tensor, "tile width"],
        dtype: torch.dtype = torch.float32,
        chunk: int = 0,
    ) -> Float[Tensor, "query tile"]:
        """Score a chunk of tiles at a time (0: CHUNK's number); tiles may be in half precision."""
        cosine = _CandidateCosine(self.heads.candidate_mlp, dtype)
        embedding, query_proj = self.heads.split(query)
        embedding, query_proj = embedding.float(), query_proj.to(dtype)
        scores = torch.empty(len(query), len(tile), device=query.device)
        step = chunk or CHUNK[query.device.type]
        for begin in range(0, len(tile), step):
            tile_proj = tile[begin : begin + step, self.shortlist_width :].to(dtype)
            for row in range(len(query)):
                found = cosine(tile_proj, query_proj[row], embedding[row])
                scores[row, begin : begin + step] = found
        return scores

    def fastest_dtype(self, queries: int) -> torch.dtype:
        """Return the type in which this many queries are scored first."""
        return hardware.fastest_dtype(self.device)


class _CandidateCosine:
    """Cosines of one query and candidates that go through a `ResidualMLP`; memory is reused."""

    def __init__(self, mlp: ResidualMLP, dtype: torch.dtype) -> None:
        layers = (mlp.middle, mlp.last)
        self.weights = [(layer.weight.to(dtype).T, layer.bias.to(dtype)) for layer in layers]
        self.buffers: list[Tensor] = []

    def __call__(
        self,
        tiles: Float[Tensor, "tile hidden"],
        query_proj: Float[Tensor, " hidden"],
        embedding: Float[Tensor, " hidden"],
    ) -> Float[Tensor, " tile"]:
        if not self.buffers or self.buffers[0].shape != tiles.shape:
            self.buffers = [torch.empty_like(tiles) for _ in range(3)]
        first, active, middle = self.buffers
        (w2, b2), (w3, b3) = self.weights
        torch.add(tiles, query_proj, out=first)
        torch.clamp(first, min=0, out=active)
        torch.addmm(b2, active, w2, out=middle).relu_()
        # The product with the query in fp32: bf16 would give scores of 8 bits, and ties.
        last = torch.addmm(first.add_(b3), middle, w3, out=active).float()
        return (last @ embedding) / torch.linalg.vector_norm(last, dim=1).clamp(min=1e-12)
