"""Checkpoints in the midst of an epoch: what lets a stopped run go on without the epoch's begin.

    <run>/mid_epoch.json               the latest one: its epoch, its steps, its directory
    <run>/mid_epoch/0002-00000120/     state.pt, and seen.npy: the keys of the rows that were used

Rows are told by their keys, so another number of workers goes on where the earlier one stopped:
what is left of an epoch is all rows but those.
"""

import io
import logging
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Int64
from pyarrow import fs
from ray.data import Dataset
from ray.train import Checkpoint

from cvmatch.data import storage
from cvmatch.training import checkpoints

LATEST, DIRECTORY, SEEN = "mid_epoch.json", "mid_epoch", "seen.npy"

_log = logging.getLogger(__name__)

Keys = Int64[np.ndarray, " row"]


class MidEpoch(TypedDict):
    """The latest checkpoint in the midst of an epoch."""

    epoch: int
    """Epochs that were finished before it."""
    steps: int
    """Steps of a worker in its epoch."""
    means: Mapping[str, float]
    """Of the losses, over the rows that were used."""
    directory: str
    """Its name in the run's directory."""


def find(run: str) -> MidEpoch | None:
    """Return the latest such checkpoint of a run, None where there is none."""
    location = storage.join(run, LATEST)
    return storage.read_json(location) if storage.exists(location) else None


def checkpoint(run: str, found: MidEpoch) -> Checkpoint:
    """Return the checkpoint that holds the state of its training."""
    return Checkpoint(storage.join(run, found["directory"]))


def read_seen(run: str, found: MidEpoch) -> Keys:
    """Read the keys of the rows that its epoch had used."""
    data = storage.read_bytes(storage.join(run, found["directory"], SEEN))
    return np.load(io.BytesIO(data), allow_pickle=False)


def select_rest(rows: Dataset, run: str) -> Dataset:
    """Return the rows that are left of the epoch that was begun; all, where none was."""
    found = find(run)
    if found is None:
        return rows
    leave_out: Any = _leave_out
    return rows.map_batches(leave_out, fn_kwargs={"seen": read_seen(run, found)})


def _leave_out(batch: Mapping[str, np.ndarray], seen: Keys) -> dict[str, np.ndarray]:
    left = ~np.isin(batch["key"], seen)
    return {name: values[left] for name, values in batch.items()}


class MidEpochWriter:
    """Writes such checkpoints of a run, one at a time, while the training goes on."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._thread = ThreadPoolExecutor(1, "mid-epoch")
        self._upload: Future[None] | None = None

    def write(
        self,
        epoch: int,
        steps: int,
        means: Mapping[str, float],
        state: Mapping[str, Any],
        seen: Keys,
    ) -> None:
        """Keep a copy here at once, and put it into the run's directory in a thread.

        Nothing is written while the one before is on its way.
        """
        if self._upload and not self._upload.done():
            return
        self._report()
        local = tempfile.TemporaryDirectory()
        torch.save(state, os.path.join(local.name, checkpoints.STATE))
        np.save(os.path.join(local.name, SEEN), seen, allow_pickle=False)
        name = f"{DIRECTORY}/{epoch:04d}-{steps:08d}"
        found = MidEpoch(epoch=epoch, steps=steps, means=means, directory=name)
        self._upload = self._thread.submit(self._put, local, found)

    def clear(self) -> None:
        """Delete what is there, once its epoch is finished."""
        self._report()
        try:
            if find(self.run):
                storage.remove(storage.join(self.run, LATEST))
                storage.remove(storage.join(self.run, DIRECTORY))
        except OSError as error:  # of a finished epoch, it is not used
            _log.warning("%s: cannot delete %s now: %s", self.run, DIRECTORY, error)

    def _put(self, local: tempfile.TemporaryDirectory, found: MidEpoch) -> None:
        with local as directory:
            place = storage.join(self.run, found["directory"])
            checkpoints.copy_tree(fs.LocalFileSystem(), directory, place)
            before = find(self.run)
            storage.write_json(storage.join(self.run, LATEST), found)
            if before and before["directory"] != found["directory"]:
                storage.remove(storage.join(self.run, before["directory"]))

    def _report(self) -> None:
        """Wait for the last one; warn where it could not be written: that ends no training."""
        if self._upload and (error := self._upload.exception()):
            _log.warning("%s: a checkpoint in the midst of an epoch was lost: %s", self.run, error)
        self._upload = None
