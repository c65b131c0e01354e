"""Settings of a training run, whatever is trained."""

import re
from dataclasses import dataclass
from typing import Literal

_SCORES = re.compile(r"recall|mrr|iou|psnr|ssim|ncc|gap", re.IGNORECASE)
"""In the names of metrics of which large values are good; all others are losses or errors."""


def is_score(metric: str) -> bool:
    """Return whether large values of a metric of a training are good."""
    return _SCORES.search(metric) is not None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    epochs: int = 10
    """Passes over the training rows."""
    batch: int = 8
    """Rows of a step, over all workers (of a changing number of them, the most that they can share
    evenly)."""
    accumulate: int = 1
    """Steps whose gradients are averaged before the weights move."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW)."""
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    """Learning rate: constant, cosine to zero, or a tenth whenever the validation loss stalls."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises from zero (not with plateau)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU."""
    workers: int = 0
    """Ray Train workers (DDP); 0: train in this process, without the 30 s of their start."""
    max_workers: int = 0
    """Workers at most: the training takes what the cluster has, at least `workers`, and starts them
    again from the last checkpoint when nodes come or go. 0: always `workers`."""
    checkpoint_minutes: float = 10.0
    """Minutes from one checkpoint in the midst of an epoch to the next, and one is written when a
    node is about to be taken away; 0: at the end of an epoch alone."""
    cpus_per_worker: float = 1.0
    """Logical CPUs of a worker."""
    gpus_per_worker: int = 0
    """GPUs of a worker: 0 or 1. (With `workers` = 0 a GPU is used if there is one.)"""
    label: str = ""
    """Value of the node label `pool` (cluster.yaml) to run workers on; empty: anywhere."""
    seed: int = 0
    """Seed of weights, order of rows and all draws."""
    shuffle: int = 1024
    """Rows that a worker holds decoded to shuffle them; 0: the order of the data set."""
    storage: str = "runs"
    """Directory or URI of runs, shared by all nodes."""
    name: str = ""
    """Name of the run: the same name and storage resume it. Empty: a new run every time."""
    best: str = ""
    """Metric whose best checkpoint is published, such as val/loss or val/miou; empty: the last."""
    max_failures: int = 2
    """Restarts of the workers, from the last checkpoint, before the run fails."""
    cache: bool = False
    """Keep the decoded rows in the object store, for data that fits in memory."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.accumulate) < 1:
            raise ValueError(
                f"fit: expected epochs and accumulate >= 1, got {self.epochs} and "
                f"{self.accumulate}."
            )
        if self.workers < 0:
            raise ValueError(f"fit: expected workers >= 0, got {self.workers}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"fit: warmup is a share of the steps in [0, 1), got {self.warmup}.")
        if self.checkpoint_minutes < 0:
            raise ValueError(
                f"fit: expected checkpoint_minutes >= 0, got {self.checkpoint_minutes}."
            )
        self._check_workers()

    def _check_workers(self) -> None:
        workers = max(self.workers, 1)
        if self.max_workers and not 1 <= self.workers < self.max_workers <= self.batch:
            raise ValueError(
                f"fit: expected max_workers above workers >= 1, and a batch of a row for each, got "
                f"{self.max_workers}, {self.workers} and a batch of {self.batch}."
            )
        if not self.max_workers and (self.batch < 1 or self.batch % workers):
            raise ValueError(
                f"fit: expected a batch that {workers} workers can share evenly, got {self.batch}. "
                f"Try --fit.batch {max(workers, round(self.batch / workers) * workers)}."
            )

    @property
    def most_workers(self) -> int:
        """How many workers share a step at most."""
        return max(self.workers, self.max_workers, 1)
