"""What the trainings of the toy base models share: steps, the mean of weights, and turned tiles."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

log = logging.getLogger(__name__)


def optimise(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    rows: int,
    steps: int,
    *,
    batch: int,
    rate: float,
    decay: float = 0.0,
    bfloat16: bool = False,
) -> None:
    """AdamW with a warm-up of 5 % of the steps and a cosine down to zero; `loss` takes row numbers.

    `decay` is of the running mean of the weights that the model ends with; 0: with the last ones.
    """
    weights = list(model.parameters())
    at = weights[0].device
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    mean = running_mean(model, decay)
    recent = torch.zeros((), device=at)
    for step in range(steps):
        with torch.autocast(at.type, torch.bfloat16, enabled=bfloat16):
            value = loss(torch.randint(rows, (batch,), device=at))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        plan.step()
        mean.update_parameters(model)
        recent += (value.detach() - recent) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            log.info("step %d of %d, loss %.4f", step + 1, steps, recent.item())
    model.load_state_dict(mean.module.state_dict())


def running_mean(model: nn.Module, decay: float) -> AveragedModel:
    """Of the weights, over about the last 1 / (1 - decay) updates, or the last tenth if fewer.

    The first weights are random, and must not stay in it.
    """

    @torch.no_grad()
    def update(mean: Any, now: Any, done: Any) -> None:
        kept = min(decay, (1 + int(done)) / (10 + int(done)))
        torch._foreach_lerp_(mean, now, 1 - kept)

    return AveragedModel(model, multi_avg_fn=update)


def turned(
    tile: UInt8[Tensor, "batch channel size size"],
) -> UInt8[Tensor, "batch channel size size"]:
    """The batch turned by quarters and mirrored at random: north is no direction of its own."""
    tile = torch.rot90(tile, int(torch.randint(4, ())), (-2, -1))
    return tile.flip(-1) if torch.rand(()) < 0.5 else tile
