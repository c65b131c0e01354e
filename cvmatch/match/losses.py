"""A square matrix of scores, own pairs on its diagonal -> a loss; and the gather over DDP workers.

Every loss is symmetric: rows compare a query's own tile with other tiles, columns a tile's own
query with other queries. A score is a cosine, in [-1, 1].
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


def triplet(score: Float[Tensor, "n n"], margin: float) -> Float[Tensor, ""]:
    """Average max(0, margin + d_own - d_other) over anchors and negatives, d = 1 - cosine (0 to 2).

    Over every negative of every anchor; the mean of the row and the column side. 0 for a single
    pair.
    """
    return (_hinge(score, margin) + _hinge(score.T, margin)) / 2


def info_nce(
    score: Float[Tensor, "n n"], scale: Float[Tensor, ""], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Average the cross entropy of each own pair among its row and its column.

    Args:
        score: Scores of queries (rows) and tiles (columns).
        scale: Inverse temperature that multiplies them.
        smoothing: Share of the target that is spread evenly (label smoothing, in [0, 1)).
    """
    truth = torch.arange(len(score), device=score.device)
    logits = score * scale
    rows = nn.functional.cross_entropy(logits, truth, label_smoothing=smoothing)
    return (rows + nn.functional.cross_entropy(logits.T, truth, label_smoothing=smoothing)) / 2


def all_gather(local: Float[Tensor, "row dim"]) -> Float[Tensor, "all dim"]:
    """Concatenate `local` of all DDP workers in rank order, with gradient.

    The gradient of a worker's part is the *sum* over workers. If all workers then compute the same
    loss from the gathered values, DDP's average of gradients is the gradient of that loss, as one
    worker with the whole batch would have it. Workers must hold equally many rows.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return _AllGather.apply(local)


class _AllGather(torch.autograd.Function):
    """All-gather whose backward sums over workers, on gloo (no reduce-scatter) and NCCL alike."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        shares = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, local.contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _hinge(score: Tensor, margin: float) -> Tensor:
    values = (margin - score.diagonal()[:, None] + score).relu()
    count = max(1, len(values) * (len(values) - 1))
    return (values.sum() - values.diagonal().sum()) / count
