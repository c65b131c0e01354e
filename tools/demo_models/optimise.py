"""What the trainings of the toy base models share: steps, and turned tiles."""

import contextlib
import logging
from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from cvmatch.runtime import hardware
from cvmatch.training.ema import EMA

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
    mean = EMA(decay) if decay else None
    recent = torch.zeros((), device=at)
    for step in range(steps):
        with hardware.autocast(at) if bfloat16 else contextlib.nullcontext():
            value = loss(torch.randint(rows, (batch,), device=at))
        descend(plan, value)
        if mean:
            mean.update(weights)
        recent += (value.detach() - recent) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            log.info("step %d of %d, loss %.4f", step + 1, steps, recent.item())
    if mean:
        mean.copy_to(weights)


def make_schedule(model: nn.Module, rate: float, steps: int) -> LambdaLR:
    """Adam with a short memory, a warm-up of 50 steps, and a rate that ends at zero."""
    adam = torch.optim.Adam(model.parameters(), rate, betas=(0.5, 0.9))
    return LambdaLR(adam, lambda n: min(1, (n + 1) / 50, 3 * (1 - n / steps)))


def descend(plan: LRScheduler, loss: Tensor) -> None:
    """A step of the plan and its optimizer, of gradients clipped to a norm of 1."""
    optimizer = plan.optimizer
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    plan.step()


def rotate_at_random(
    tile: UInt8[Tensor, "batch channel size size"],
) -> UInt8[Tensor, "batch channel size size"]:
    """The batch turned by quarters and mirrored at random: north is no direction of its own."""
    tile = torch.rot90(tile, int(torch.randint(4, ())), (-2, -1))
    return tile.flip(-1) if torch.rand(()) < 0.5 else tile
