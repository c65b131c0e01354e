"""Exponential moving average (EMA) of a model's trained weights."""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

M = TypeVar("M", bound=nn.Module)


class EMA(nn.Module):
    """EMA of trained weights; with a decay of 0.99 of about their last 100 moves.

    It is state, but neither parameter nor buffer: DDP would send it around in every step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay, self.steps = decay, 0
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor]) -> None:
        """Count the weights after a move; the first ones are forgotten sooner than later ones."""
        now: list[Any] = [weight.detach() for weight in weights]
        if not self.values:
            self.values = [weight.clone() for weight in now]
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.values = [value.to(new.device) for value, new in zip(self.values, now, strict=True)]
        get_ema_multi_avg_fn(decay)(self.values, now, self.steps)
        self.steps += 1

    @torch.no_grad()
    def of(self, model: M) -> M:
        """Return a copy of the model with the averaged weights, or the model before any step."""
        if not self.values:
            return model
        averaged = copy.deepcopy(model)
        self.copy_to(trained_weights(averaged))
        return averaged

    @torch.no_grad()
    def copy_to(self, weights: Iterable[Tensor]) -> None:
        """Set the weights, in the order of `update`, to their averages."""
        for weight, value in zip(weights, self.values, strict=True):
            weight.copy_(value)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"steps": self.steps, "values": self.values}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_extra_state`."""
        self.steps, self.values = state["steps"], state["values"]


def trained_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return its parameters that are not frozen, in their order."""
    return [weight for weight in module.parameters() if weight.requires_grad]
