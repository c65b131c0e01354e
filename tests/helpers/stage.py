"""A stage in small, for the tests of training and tuning: noisy rows -> a line."""

import functools
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn

from cvmatch.nn import rng
from cvmatch.runtime import tracking
from cvmatch.training import launch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.settings import TrainConfig
from cvmatch.training.task import ParameterGroup
from cvmatch.tune.execution import StageCode


def rows(count: int, seed: int = 0, block: int = 8) -> Dataset:
    """`count` rows of `x` (4 numbers), `y` = x @ (1, 2, 3, 4) and `key`, made when read."""

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        keys = np.array([rng.row_key(f"{seed}/{index}") for index in batch["id"]])
        x = rng.normal(torch.tensor(keys), rng.fold_in(seed), 4).numpy()
        return {"x": x, "y": x @ np.arange(1, 5, dtype=np.float32), "key": keys}

    blocks = max(1, count // block)
    ids = ray.data.range(count, override_num_blocks=blocks)
    return ids.map_batches(make, batch_size=block)  # pyright: ignore[reportArgumentType]


class LineTask(nn.Module):
    """`x` and `y` -> the squared error of a line, with a frozen scale and noise from `draws`."""

    def __init__(
        self,
        lr: float,
        noise: float = 0.0,
        dropout: float = 0.0,
        pause: float = 0.0,
        bomb: str = "",
    ) -> None:
        """`pause`: seconds a step; `bomb`: a file that, in epoch 1, ends the process and goes."""
        super().__init__()
        self.pause, self.bomb = pause, bomb
        self.lr, self.noise = lr, noise
        self.line = nn.Linear(4, 1)
        self.drop = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"] * self.scale
        if self.training:
            self._suffer(int(batch["epoch"]))
            stream = rng.fold_in(0, int(batch["epoch"]), "noise")
            x = x + self.noise * rng.normal(batch["key"], stream, 4)
            self.seen += len(x)
        error = self.line(self.drop(x))[:, 0].float() - batch["y"]
        named = {"loss": error.square().mean(), "absolute": error.detach().abs().mean()}
        if not self.training:
            named["signs"] = torch.stack([(error > 0).float().mean(), (error <= 0).float().mean()])
            named["epoch"] = batch["epoch"].float()
        return named

    def _suffer(self, epoch: int) -> None:
        time.sleep(self.pause)
        if epoch == 1 and os.path.exists(self.bomb):
            os.remove(self.bomb)
            os._exit(1)

    def groups(self) -> list[ParameterGroup]:
        return [
            {"params": [self.line.weight, self.scale], "lr": self.lr},
            {"params": [self.line.bias], "lr": self.lr / 10},
        ]

    def save(self, directory: str) -> None:
        save_file(self.state_dict(), os.path.join(directory, "line.safetensors"))

    def summary(self, means: dict[str, Tensor]) -> dict[str, float | np.ndarray]:
        scalars = {name: value.item() for name, value in means.items() if not value.ndim}
        return {**scalars, "above": means["signs"][0].item(), "signs": means["signs"].sum().item()}


LINE = functools.partial(LineTask, 0.05, 0.1)


def rename_run(fit: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    """The settings of another run."""
    return replace(fit, name=name, **changes)


@dataclass(frozen=True, kw_only=True)
class TrainLine:
    """Settings of the stage."""

    val: int = 8
    lr: float = 0.1
    output: str = "line"
    log: str = ""
    fit: TrainConfig = TrainConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if self.lr > 100:
            raise ValueError(f"train_line: lr is at most 100, got {self.lr}.")


def train(config: TrainLine) -> TrainResult:
    """Train and publish; notes in `config.log` that it was called."""
    with open(config.log, "a", encoding="utf-8") as file:
        file.write(f"{config.fit.name}\n")
    build = functools.partial(LineTask, config.lr)
    with tracking.start("line", config) as run:
        result = launch.train(build, rows(32), rows(config.val, seed=1), config.fit, run)
        launch.publish(result, config.output)
    return result


def measure(config: TrainLine, checkpoint: str) -> dict[str, float]:
    """Measure a checkpoint on `config.val` rows of another seed."""
    build = functools.partial(LineTask, config.lr)
    return launch.measure(build, rows(config.val, seed=1), config.fit, checkpoint)


CODE = StageCode(train=train, measure=measure)
