"""Exact joint scores of many tiles: the split form, a chunk of tiles at a time."""

import torch
from jaxtyping import Float
from torch import Tensor

from cvmatch.match.fusion import Fusion, Query, ResidualMLP

CHUNK = {"cpu": 2048, "cuda": 65_536}
"""Tiles scored at a time. On a CPU, 100k at once are 3.5 times slower (allocator and cache);
of 1,024 to 4,096, which differ by 10 % at most, 2,048 are the fastest."""

_MATRIX_UNITS = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
"""Capabilities of a CPU, as torch names them, with which it multiplies bf16 faster than fp32."""


def fastest(device: torch.device) -> torch.dtype:
    """The type in which a device scores fastest: bf16 where it has units for it, else fp32.

    With avx512_bf16 its matrix products are 3 times as fast, the whole 1.2 times on a busy machine
    (benchmarks/scoring.py); with AMX 2.7 times. Its scores are within 0.01 of fp32's, so the best
    ones are to be scored again.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
        bf16 = any(capable.get(unit) for unit in _MATRIX_UNITS)
    return torch.bfloat16 if bf16 else torch.float32


@torch.no_grad()
def joint_scores(
    model: Fusion,
    query: Query,
    tile_proj: Float[Tensor, "tile hidden"],
    dtype: torch.dtype = torch.float32,
    chunk: int = 0,
) -> Float[Tensor, "query tile"]:
    """`pair_scores` in fp32, computed in `dtype`; `tile_proj` may be the stored half precision.

    Equal to the joint form FFN_C([a; c]) but for rounding: 1e-6 in fp32. `chunk` 0 takes CHUNK's.
    """
    rest = _Fast(model.candidate_mlp, dtype)
    embedding, query_proj = query.embedding.float(), query.query_proj.to(dtype)
    found = torch.empty(len(query_proj), len(tile_proj), device=query_proj.device)
    step = chunk or CHUNK[query_proj.device.type]
    for begin in range(0, len(tile_proj), step):
        tiles = tile_proj[begin : begin + step].to(dtype)
        for row in range(len(query_proj)):
            found[row, begin : begin + step] = rest.cosines(tiles, query_proj[row], embedding[row])
    return found


class _Fast:
    """`ResidualMLP` times a vector, in memory that is used again."""

    def __init__(self, rest: ResidualMLP, dtype: torch.dtype) -> None:
        layers = (rest.middle, rest.last)
        self.weights = [(layer.weight.to(dtype).T, layer.bias.to(dtype)) for layer in layers]
        self.buffers: list[Tensor] = []

    def cosines(
        self,
        tiles: Float[Tensor, "tile hidden"],
        query_proj: Float[Tensor, " hidden"],
        embedding: Float[Tensor, " hidden"],
    ) -> Float[Tensor, " tile"]:
        """Cosines of one query and the tiles."""
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
