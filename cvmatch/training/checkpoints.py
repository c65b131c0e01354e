"""The directory of a training run: a checkpoint for each epoch, and the ledger that lists them.

    <storage>/<name>/epochs.json       what the run is, and the metrics of each finished epoch
    <storage>/<name>/progress.json     the step it is at
    <storage>/<name>/epoch_0003/       model/ (for inference), state.pt (to resume), curve.json,
                                       pictures

Both ways of training (Ray Train, this process) write it alike. An epoch counts once it is in the
ledger, and it gets there after its checkpoint is whole. Checkpoints in the midst of an epoch are
`mid_epoch`'s.
"""

import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import pandas as pd
from pyarrow import fs
from ray.train import Checkpoint, UserCallback

from cvmatch.data import images, storage
from cvmatch.runtime import tracking
from cvmatch.runtime.gauges import set_gauge
from cvmatch.training.settings import is_score

LEDGER = "epochs.json"
FORMAT = 2
"""Of the ledger; a run of another format cannot be resumed."""
PROGRESS = "progress.json"
CURVE = "curve.json"
MODEL = "model"
STATE = "state.pt"

_log = logging.getLogger(__name__)


def name_of(epoch: int) -> str:
    """Return the name of the checkpoint after `epoch` epochs."""
    return f"epoch_{epoch:04d}"


class Ledger(TypedDict):
    """What a run is, and what it has done."""

    format: int
    identity: Mapping[str, Any]
    """Its settings and inputs, by name."""
    epochs: list[Mapping[str, Any]]
    """Metrics of the finished epochs, in their order."""


class Progress(TypedDict):
    """The step that a run is at; `steps` of `epochs` in all."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float


@dataclass(frozen=True)
class TrainResult:
    """What a training run ended with."""

    metrics: Mapping[str, Any]
    """Of its best epoch."""
    history: pd.DataFrame
    """Metrics of each epoch, a row each."""
    path: str
    """Location of the run's directory."""
    checkpoint: str
    """Location of the best epoch's checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Where a run keeps its checkpoints, and which of them it keeps."""

    location: str
    """Absolute path or URI: storage/name."""
    keep: int = 2
    """Checkpoints kept, beside the latest."""
    best: str = ""
    """Metric that ranks checkpoints; "": the later the better."""

    def entries(self) -> list[Mapping[str, Any]]:
        """Return the metrics of the finished epochs, in their order."""
        return self._ledger()["epochs"]

    def begin_or_resume(self, identity: Mapping[str, Any]) -> None:
        """Record what the run is, or check that a run to be resumed is the same.

        Raises:
            ValueError: the directory holds a run with other settings; says which.
        """
        ledger = self._ledger()
        before = ledger["identity"]
        if before and ledger["epochs"]:
            changed = [
                f"{name}: {before.get(name)!r} before, now {identity.get(name)!r}"
                for name in sorted({*before, *identity})
                if before.get(name) != identity.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{self.location} holds a run with other settings ({'; '.join(changed)}), "
                    "which cannot be resumed. Choose another --fit.name, or delete the directory."
                )
        self._write({**ledger, "identity": dict(identity)})

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Enter an epoch whose checkpoint is whole; later ones are forgotten (a repeated epoch)."""
        ledger = self._ledger()
        earlier = [e for e in ledger["epochs"] if e["epoch"] < metrics["epoch"]]
        self._write({**ledger, "epochs": [*earlier, dict(metrics)]})

    def place(self, epoch: int) -> str:
        """Return the location of the checkpoint after `epoch` epochs."""
        return storage.join(self.location, name_of(epoch))

    def checkpoint(self, epoch: int) -> Checkpoint:
        """Return that checkpoint. Its `path` is no location: Ray keeps the file system apart."""
        return Checkpoint(self.place(epoch))

    def model(self, epoch: int) -> str:
        """Return the location of the model in that checkpoint."""
        return storage.join(self.place(epoch), MODEL)

    def latest(self) -> int:
        """Return the epochs done whose checkpoint is there; 0 for a new run."""
        done = [e["epoch"] for e in self.entries() if self._holds(e["epoch"])]
        return max(done, default=0)

    def prune(self) -> None:
        """Delete the checkpoints that rank below `keep`, but never the latest."""
        done = [e for e in self.entries() if self._holds(e["epoch"])]
        kept = {e["epoch"] for e in self._ranked(done)[: self.keep]} | {done[-1]["epoch"]}
        for entry in done:
            if entry["epoch"] not in kept:
                storage.remove(self.place(entry["epoch"]))

    def result(self) -> TrainResult:
        """Return metrics and checkpoint of the best epoch (by `best`, or the last)."""
        entries = self.entries()
        held = self._ranked([e for e in entries if self._holds(e["epoch"])])
        checkpoint = self.place(held[0]["epoch"])
        return TrainResult(held[0], pd.DataFrame(entries), self.location, checkpoint)

    def _ranked(self, entries: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        if not self.best:
            return entries[::-1]
        if any(self.best not in e for e in entries):
            raise ValueError(
                f"{self.location}: expected the metric {self.best!r} (--fit.best), got "
                f"{sorted(entries[0])}. Name one of those, or pass validation rows."
            )
        # NaN compares with nothing: an epoch of it would stand wherever the sorting left it.
        judged = [e for e in entries if not math.isnan(e[self.best])]
        others = [e for e in entries if e not in judged]
        sign = -1 if is_score(self.best) else 1
        return sorted(judged, key=lambda e: (sign * e[self.best], -e["epoch"])) + others[::-1]

    def _holds(self, epoch: int) -> bool:
        return storage.exists(self.place(epoch))

    def _ledger(self) -> Ledger:
        location = storage.join(self.location, LEDGER)
        if not storage.exists(location):
            return {"format": FORMAT, "identity": {}, "epochs": []}
        ledger = storage.read_json(location)
        if ledger.get("format") != FORMAT:
            raise ValueError(
                f"{location}: expected format {FORMAT}, got {ledger.get('format')}: another "
                "version of cvmatch began this run. Choose another --fit.name, or delete the "
                "directory."
            )
        return ledger

    def _write(self, ledger: Ledger) -> None:
        storage.write_json(storage.join(self.location, LEDGER), ledger)


class RunRecorder(UserCallback):
    """Enters each epoch in the ledger and in MLflow.

    Ray calls it in the controller, on the driver's node, where a SQLite store can be reached; in
    a training of this process `launch.LocalBackend` does.
    """

    def __init__(self, directory: RunDirectory, run: tracking.Run | None) -> None:
        self.directory = directory
        self.run = run

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Enter what rank 0 reported."""
        if checkpoint is None:
            return
        self.directory.add(metrics[0])
        for name, value in metrics[0].items():
            if name.startswith("val/"):
                run = self.directory.location.rpartition("/")[2]
                set_gauge("cvmatch_validation", value, run=run, name=name.removeprefix("val/"))
        if self.run:
            place = self.directory.place(metrics[0]["epoch"])
            curve = storage.read_json(storage.join(place, CURVE))
            self.run.points(("step/loss", step, loss) for step, loss in curve)
            self.run.metrics(metrics[0], step=metrics[0]["epoch"])
            self._pictures(metrics[0]["epoch"])

    def _pictures(self, epoch: int) -> None:
        location = self.directory.place(epoch)
        for file in storage.names(location):
            if self.run and file.endswith(".png"):
                pixels = images.decode(storage.read_bytes(storage.join(location, file)))
                self.run.image(f"{file.removesuffix('.png')}/{name_of(epoch)}", pixels)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Say in MLflow why the workers were started again."""
        for rank, error in worker_exceptions.items():
            _log.warning("worker %d of %s failed: %s", rank, self.directory.location, error)
            if self.run:
                self.run.tag("last_error", f"worker {rank}: {error!r}"[:4000])


def copy_tree(source: fs.FileSystem, path: str, target: str) -> None:
    """Copy a directory so that `target` is whole whenever it is there.

    On a file system: aside, then renamed. Object stores have no rename, so there the files arrive
    one by one, and readers go by what is written after them (a ledger, a manifest).
    """
    filesystem, place = storage.resolve(target)
    if filesystem.type_name in ("s3", "gcs", "abfs"):
        fs.copy_files(path, place, source_filesystem=source, destination_filesystem=filesystem)
        return
    aside = f"{place}.{uuid.uuid4().hex}.tmp"
    filesystem.create_dir(aside)
    fs.copy_files(path, aside, source_filesystem=source, destination_filesystem=filesystem)
    if filesystem.get_file_info(place).type != fs.FileType.NotFound:
        old = f"{aside}.old"
        filesystem.move(place, old)
        filesystem.move(aside, place)
        filesystem.delete_dir(old)
        return
    filesystem.move(aside, place)
