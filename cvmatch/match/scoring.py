"""Scores of many tiles, from the vectors of queries and of tiles."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cvmatch.match.fusion import JointHeads
from cvmatch.match.heads import ResidualMLP

CHUNK = {"cpu": 2048, "cuda": 65_536}
"""Tiles that a joint score takes at a time (docs/decisions.md#scoring-in-chunks)."""


@runtime_checkable
class Scorer(Protocol):
    """How well tiles fit queries."""

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        ...

    width: int
    """Numbers of a tile's vector."""
    shortlist_width: int
    """Its first numbers, whose product with a query's is the score, or comes near it."""

    def __call__(
        self,
        query: Float[Tensor, "query width"],
        tile: Float[Tensor, "tile width"],
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "query tile"]:
        """Score every query against every tile, in fp32, computed in `dtype`."""
        ...


class SumScorer:
    """Inner products: the weighted sum of the branches' cosines."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = self.shortlist_width = width
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        """Where the queries have to be."""
        return self._device

    @torch.no_grad()
    def __call__(
        self,
        query: Float[Tensor, "query width"],
        tile: Float[Tensor, "tile width"],
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "query tile"]:
        """Return query x tile products."""
        return (query.to(dtype) @ tile.to(dtype).T).float()


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
