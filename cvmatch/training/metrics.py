"""Means over rows, the loss curve, and the tensors of a batch."""

import logging
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from cvmatch.data import storage
from cvmatch.runtime.gauges import set_gauge
from cvmatch.training import checkpoints

ROWS = "rows/"
"""Names of evaluation results that are kept row by row begin with this (`Task.forward`)."""

ROW_KEY = f"{ROWS}key"
"""Name of the keys of kept rows."""

POINTS = 200
"""Points of a run's loss curve, at most about."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class MeanMetrics:
    """Means of named tensors over rows, in batches of any sizes; `rows/...` are kept row by row."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.kept: dict[str, list[Tensor]] = {}
        self.rows = 0

    def add(self, values: Mapping[str, Tensor], rows: int) -> None:
        """Count the means over a batch of `rows`."""
        for name, value in values.items():
            if name.startswith(ROWS):
                self.kept.setdefault(name, []).append(value.detach().cpu())
                continue
            share = value.detach().double() * rows
            self.sums[name] = self.sums[name] + share if name in self.sums else share
        self.rows += rows

    def reduce(self, world: int) -> dict[str, Tensor]:
        """Return means over the rows of all workers, and kept rows, on the CPU; same on each.

        With ROW_KEY among them, kept rows are in its order, each key once: then neither the batches
        nor the workers matter.

        Raises:
            ValueError: there were no rows at all.
        """
        sums = {name: value.cpu() for name, value in self.sums.items()}
        kept = {name: torch.cat(values) for name, values in self.kept.items()}
        # As objects: a worker without a validation row does not know the names.
        workers = gather((sums, kept, self.rows), world)
        total = sum(rows for _, _, rows in workers)
        if not total:
            raise ValueError("no rows: pass validation rows that are not empty, or none (val=None)")
        summed = _group([sums for sums, _, _ in workers])
        rows = _group([kept for _, kept, _ in workers])
        means = {name: torch.stack(parts).sum(0) / total for name, parts in summed.items()}
        return means | _order_by_key({name: torch.cat(parts) for name, parts in rows.items()})


def _order_by_key(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    if ROW_KEY not in rows:
        return rows
    keys, order = rows[ROW_KEY].sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return {name: values[order[first]] for name, values in rows.items()}


def gather(own: T, world: int) -> list[T]:
    """Return what each worker has, tensors on the CPU, in the order of ranks; all call it."""
    workers: list[Any] = [own]
    if world > 1:
        workers = [None] * world
        torch.distributed.all_gather_object(workers, own)
    return workers


def _group(workers: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Group the values of all workers by name; not every worker has all of them."""
    names = dict.fromkeys(name for values in workers for name in values)
    return {name: [values[name] for values in workers if name in values] for name in names}


class LossCurve:
    """The loss curve of a run, and its progress.json."""

    def __init__(self, directory: str, steps: int, epochs: int, *, writes: bool) -> None:
        self.location = storage.join(directory, checkpoints.PROGRESS)
        self.steps, self.epochs, self.writes = steps, epochs, writes
        self.every = max(1, steps * epochs // POINTS)
        # An object store takes a request for each; a file system, nothing.
        self.pause = 10.0 if "://" in directory else 1.0
        self.points: list[tuple[int, float]] = []
        self.recent: list[Tensor] = []
        self.written = 0.0

    def tick(self, step: int, loss: Tensor) -> None:
        """Note the loss of a step, the `step`-th of the run."""
        if not self.writes:
            return
        self.recent.append(loss)
        last = step == self.steps * self.epochs
        if len(self.recent) >= self.every or last:
            self.points.append((step, torch.stack(self.recent).mean().item()))
            self.recent = []
        if last or time.monotonic() - self.written > self.pause:
            self.written = time.monotonic()
            value: checkpoints.Progress = {
                "step": step,
                "steps": self.steps * self.epochs,
                "epoch": (step - 1) // self.steps + 1,
                "epochs": self.epochs,
                "loss": loss.item(),
            }
            run = self.location.split("/")[-2]
            set_gauge("cvmatch_train_steps", step, run=run)
            set_gauge("cvmatch_train_epoch", step // self.steps, run=run)
            set_gauge("cvmatch_train_loss", value["loss"], run=run)
            try:
                storage.write_json(self.location, value)
            except OSError as error:  # what a training tells of itself does not end it
                _log.warning("%s: cannot write the progress now: %s", self.location, error)

    def take(self) -> list[tuple[int, float]]:
        """Return (step, mean loss since the point before) since the last call."""
        points, self.points = self.points, []
        return points


def to_tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Copy a batch of numeric columns into tensors.

    Raises:
        ValueError: a column holds strings, or pictures of several sizes.
    """
    wrong = {
        name: str(values.dtype) for name, values in batch.items() if values.dtype.kind in "OUS"
    }
    if wrong:
        raise ValueError(column_error(wrong))
    return {name: torch.tensor(values) for name, values in batch.items()}


def column_error(wrong: Mapping[str, str]) -> str:
    """Return the message about columns that are no tensors of one shape."""
    return (
        f"training rows: expected numeric tensor columns of one shape and `key`, got {dict(wrong)}."
        " Decode pictures to one size, and drop strings such as pair_id (rng.row_key makes key)."
    )
