"""Exact joint scores of many tiles: the split form, a chunk of tiles at a time."""

import torch
from jaxtyping import Float
from torch import Tensor

from cvmatch.match.fusion import Fusion, Query, ResidualMLP

CHUNK = {"cpu": 2048, "cuda": 65_536}
"""Tiles scored at a time (docs/decisions.md#scoring-in-chunks)."""


@torch.no_grad()
def joint_scores(
    model: Fusion,
    query: Query,
    tile_proj: Float[Tensor, "tile hidden"],
    dtype: torch.dtype = torch.float32,
    chunk: int = 0,
) -> Float[Tensor, "query tile"]:
    """Score every query against every tile, each tile embedded with that query's own A.

    Equal to the joint form FFN_C([a; c]) but for rounding: 1e-6 in fp32.

    Args:
        model: Heads of the matcher.
        query: Queries.
        tile_proj: Tile projections; may be in the stored half precision.
        dtype: Type to compute in; the scores are in fp32.
        chunk: Tiles at a time; 0: CHUNK's number.
    """
    cosine = _CandidateCosine(model.candidate_mlp, dtype)
    embedding, query_proj = query.embedding.float(), query.query_proj.to(dtype)
    scores = torch.empty(len(query_proj), len(tile_proj), device=query_proj.device)
    step = chunk or CHUNK[query_proj.device.type]
    for begin in range(0, len(tile_proj), step):
        tiles = tile_proj[begin : begin + step].to(dtype)
        for row in range(len(query_proj)):
            scores[row, begin : begin + step] = cosine(tiles, query_proj[row], embedding[row])
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
