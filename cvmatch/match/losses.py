"""A square matrix of scores, own pairs on its diagonal -> a loss; and the gather over DDP workers.

Every loss is symmetric: rows compare a query's own tile with other tiles, columns a tile's own
query with other queries. A score is a cosine, in [-1, 1].
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from cvmatch.match.settings import Negatives

SOFT_MARGIN_SCALE = 10.0
"""Weight gamma of the soft-margin loss, as in SAFA (Shi et al. 2019)."""


def triplet(
    score: Float[Tensor, "n n"], margin: float, negatives: Negatives = "all"
) -> Float[Tensor, ""]:
    """Mean of max(0, margin + d_own - d_other) over anchors and negatives, d = 1 - cosine (0 to 2).

    "all" averages over every negative of every anchor, "hardest" takes the closest one,
    "semi-hard" the closest that is farther than the own pair, or the farthest where none is
    (FaceNet, Schroff et al. 2015). The mean of the row and the column side; 0 for a single pair.
    """
    return (_hinge(score, margin, negatives) + _hinge(score.T, margin, negatives)) / 2


def soft_margin(score: Float[Tensor, "n n"], scale: float = SOFT_MARGIN_SCALE) -> Float[Tensor, ""]:
    """Mean of log(1 + exp(scale (d_own - d_other))) over all negatives, d = 2 - 2 cosine.

    Hu et al. 2018 (CVM-Net) with SAFA's squared distance of unit vectors; 0 for a single pair.
    """
    gap = 2 * scale * (score - score.diagonal()[:, None])
    other_query = 2 * scale * (score - score.diagonal()[None, :])
    return (
        _off_diagonal(nn.functional.softplus(gap))
        + _off_diagonal(nn.functional.softplus(other_query))
    ) / 2


def info_nce(
    score: Float[Tensor, "n n"], scale: Float[Tensor, ""], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross entropy of each own pair among its row and its column, of scores times `scale`.

    `scale` is the inverse temperature; `smoothing` spreads that share of the target evenly
    (Sample4Geo, Deuser et al. 2023, uses 0.1).
    """
    truth = torch.arange(len(score), device=score.device)
    logits = score * scale
    rows = nn.functional.cross_entropy(logits, truth, label_smoothing=smoothing)
    return (rows + nn.functional.cross_entropy(logits.T, truth, label_smoothing=smoothing)) / 2


def gathered(local: Float[Tensor, "row dim"]) -> Float[Tensor, "all dim"]:
    """`local` of all DDP workers, in rank order, with gradient; itself where there is one worker.

    The gradient of a worker's part is the *sum* over workers. If all workers then compute the same
    loss from the gathered values, DDP's average of gradients is the gradient of that loss, as one
    worker with the whole batch would have it. Workers must hold equally many rows.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return _Gather.apply(local)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums over workers, on gloo and NCCL alike."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _hinge(score: Tensor, margin: float, negatives: Negatives) -> Tensor:
    own = score.diagonal()[:, None]
    if negatives == "all":
        return _off_diagonal((margin - own + score).relu())
    if len(score) == 1:
        return score.sum() * 0
    same = torch.eye(len(score), dtype=torch.bool, device=score.device)
    hardest = score.masked_fill(same, -torch.inf)
    if negatives == "semi-hard":
        farther = hardest.masked_fill(score >= own, -torch.inf)
        easiest = score.masked_fill(same, torch.inf).amin(1, keepdim=True)
        found = farther.amax(1, keepdim=True)
        hardest = torch.where(found.isinf(), easiest, found)
    return (margin - own + hardest.amax(1, keepdim=True)).relu().mean()


def _off_diagonal(values: Tensor) -> Tensor:
    count = max(1, len(values) * (len(values) - 1))
    return (values.sum() - values.diagonal().sum()) / count
