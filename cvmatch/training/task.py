"""What a stage brings to its training: a `Task`, and the order of its rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ray.data import Dataset
from torch import Tensor

ParameterGroup = dict[str, Any]
"""`params`, weights that share a learning rate, and `lr`, as `torch.optim` takes them."""

VALIDATION_BATCH = 16
"""Rows of a validation batch, whatever the training's batch; a worker's last one has fewer."""


@dataclass(frozen=True)
class EpochOrder:
    """Training rows whose order follows what the model has learnt, such as near ones together."""

    every: int
    """Epochs from one order to the next. Ray Train's workers are started anew for each (30 s)."""
    rows: Callable[[str, int], Dataset]
    """Model directory of the latest checkpoint ("" before the first epoch) and epochs done -> the
    rows in order. A run that was stopped between two orders asks again, with a newer model."""


@runtime_checkable
class Task(Protocol):
    """What a stage adds to training: an `nn.Module` with these methods.

    Random choices come from `nn.rng` by `batch["key"]` and `batch["epoch"]` (0-d int64, on the
    CPU; 0 in validation, so that epochs compare), so a resumed run repeats them.
    """

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` and its parts: means over the rows of the batch.

        In evaluation mode tensors with axes may be among them (a confusion matrix a row), and names
        that begin with `rows/`, whose rows are not averaged but kept for `summary`. With `rows/key`
        (the batch's keys) they come there in the same order for any number of workers. There,
        workers see different numbers of batches, so it must not call collectives.
        """
        ...

    def groups(self) -> list[ParameterGroup]:
        """Parameter groups for AdamW: `params` and `lr`."""
        ...

    def save(self, directory: str) -> None:
        """Write the model directory that inference loads."""
        ...

    def summary(self, means: dict[str, Tensor]) -> Mapping[str, float | np.ndarray]:
        """Means over all validation rows, and kept rows -> scalars to log (`confusion` -> mIoU).

        An array (uint8, height x width x 3) is a picture of the epoch.
        """
        ...
