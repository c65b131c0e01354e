"""What each training worker runs: epochs of steps, validation, a checkpoint, a report.

`launch` starts it, in Ray Train's workers or in this process. What differs between the two is a
`Backend`: rank, shards, where to go on, and how an epoch is committed.
"""

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from cvmatch.data import images, storage
from cvmatch.nn import rng
from cvmatch.runtime import hardware
from cvmatch.training import checkpoints, mid_epoch
from cvmatch.training.metrics import LossCurve, MeanMetrics, gather, to_tensors
from cvmatch.training.settings import TrainConfig
from cvmatch.training.task import VALIDATION_BATCH, ParameterGroup, Task


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What each worker of a run needs to know."""

    build: Callable[[], Task]
    fit: TrainConfig
    rows: int
    """Training rows, of all workers."""
    validate: bool
    directory: str
    """Absolute location of the run directory."""
    resume: int
    """Epochs done by earlier starts of the run."""
    until: int
    """Stop after this epoch so that the rows can be re-ordered; the run continues afterwards."""
    ordered: bool = False
    """Whether the order of the rows is to be kept."""


@runtime_checkable
class Backend(Protocol):
    """Where a worker runs."""

    rank: int
    world: int
    device: torch.device

    def shard(self, name: str) -> Any:
        """This worker's rows of `train`, of the `rest` of an epoch that was begun, or of `val`."""
        ...

    def commit(self, metrics: dict[str, int | float], directory: str) -> None:
        """Hand over an epoch's metrics, and on rank 0 the directory of its checkpoint."""
        ...

    def latest(self) -> Checkpoint | None:
        """Where to go on."""
        ...

    def is_preempted(self) -> bool:
        """Return whether a worker's node is about to be taken away; all workers ask at once."""
        ...


class RayTrainBackend:
    """A worker of Ray Train (DDP)."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job, self.rank, self.world = job, context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        hardware.keep_freed_memory()
        torch.set_num_threads(max(1, int(job.fit.cpus_per_worker)))

    def shard(self, name: str) -> Any:
        """This worker's rows."""
        return ray.train.get_dataset_shard(name)

    def commit(self, metrics: dict[str, int | float], directory: str) -> None:
        """Report; Ray copies the checkpoint and calls the callbacks in the controller."""
        ray.train.report(
            metrics,
            checkpoint=Checkpoint(directory) if self.rank == 0 else None,
            checkpoint_dir_name=checkpoints.name_of(int(metrics["epoch"])),
        )

    def latest(self) -> Checkpoint | None:
        """Ray's own after a restart of the workers; else that of earlier starts."""
        return ray.train.get_checkpoint() or starting_checkpoint(self.job)

    def is_preempted(self) -> bool:
        """Return whether Ray was told that a node of the workers will go."""
        return ray.train.get_preemption_info() is not None


def starting_checkpoint(job: TrainJob) -> Checkpoint | None:
    """Return the checkpoint that earlier starts of the run left."""
    if not job.resume:
        return None
    return Checkpoint(storage.join(job.directory, checkpoints.name_of(job.resume)))


def run_epochs(job: TrainJob, backend: Backend) -> None:
    """Train from the latest checkpoint to the last epoch."""
    torch.manual_seed(job.fit.seed)
    trainer = Trainer(job, backend)
    curve = LossCurve(job.directory, trainer.steps, job.fit.epochs, writes=backend.rank == 0)
    for epoch in range(trainer.resume(), job.until):
        # Dropout and the like, which draw from torch's generator, are the same after a resume.
        begun = f" from {trainer.so_far.steps}" if trainer.so_far.steps else ""
        torch.manual_seed(rng.fold_in(job.fit.seed, epoch, f"torch {backend.rank}{begun}"))
        metrics: dict[str, int | float] = {"epoch": epoch + 1}
        metrics |= trainer.train(epoch, curve)
        pictures = {}
        if job.validate:
            validation, pictures = trainer.validate()
            metrics |= validation
        trainer.adjust(metrics)
        with tempfile.TemporaryDirectory() as directory:
            if backend.rank == 0:
                trainer.save(directory, epoch + 1)
                with open(
                    os.path.join(directory, checkpoints.CURVE), "w", encoding="utf-8"
                ) as file:
                    json.dump(curve.take(), file)
                for name, pixels in pictures.items():
                    with open(os.path.join(directory, f"{name}.png"), "wb") as file:
                        file.write(images.encode(pixels))
            backend.commit(metrics, directory)
        if backend.rank == 0:
            trainer.writer.clear()


PATIENCE = 3
"""Epochs without a better validation loss before plateau lowers the rate."""

LOOK_S = 5.0
"""Seconds from one look at whether a node will be taken away to the next."""


@dataclass
class EpochSoFar:
    """What is known of the epoch that a worker is in; of what earlier starts did, rank 0 knows."""

    steps: int = 0
    rows: int = 0
    """Rows that all workers of earlier starts have used."""
    means: MeanMetrics = field(default_factory=MeanMetrics)
    keys: list[Tensor] = field(default_factory=list)
    """Of the rows that were used."""

    def add(self, losses: dict[str, Tensor], keys: Tensor) -> None:
        """Count a step."""
        self.steps += 1
        self.means.add(losses, len(keys))
        self.keys.append(keys.cpu())


def count_steps(rows: int, workers: int, share: int) -> int:
    """Return the steps of a worker: a last row alone makes none.

    Args:
        rows: of all workers.
        workers: which share them evenly.
        share: rows of a step of one worker.
    """
    own = rows // workers
    return own // share + (own % share > 1)


class Trainer:
    """A task with its optimizer and schedule, on one worker."""

    def __init__(self, job: TrainJob, backend: Backend) -> None:
        self.job, self.fit, self.backend = job, job.fit, backend
        task = job.build()
        if not isinstance(task, nn.Module):
            raise TypeError(f"build gave {type(task).__name__}, expected an nn.Module")
        self.task = task.to(backend.device)
        self.model: Any = self.task
        if backend.world > 1:
            # Losses with terms that act now and then, and learned nulls, leave weights unused.
            options = {"find_unused_parameters": True}
            self.model = ray.train.torch.prepare_model(task, parallel_strategy_kwargs=options)
        self.weights = [p for p in self.task.parameters() if p.requires_grad]
        groups = parameter_groups(task, self.task)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=job.fit.weight_decay)
        self.share = job.fit.batch // backend.world
        self.steps = count_steps(job.rows, backend.world, self.share)
        self.schedule = build_scheduler(self.optimizer, job.fit, self.steps)
        self.so_far = EpochSoFar()
        self.writer = mid_epoch.MidEpochWriter(job.directory)
        self.written = self.looked = time.monotonic()
        self.noticed = False

    def train(self, epoch: int, curve: LossCurve) -> dict[str, float]:
        """Train what is left of an epoch; return the row-weighted means of all of it.

        They are over all workers, and are named `train/...`.
        """
        self.model.train()
        so_far, number = self.so_far, torch.tensor(epoch)
        first, steps = so_far.steps, self._count_left()
        for batch in self._batches("rest" if first else "train", epoch):
            count = so_far.steps - first
            if count == steps:  # the last row alone, which no statistic of a batch can use
                break
            group = count - count % self.fit.accumulate
            size = min(self.fit.accumulate, steps - group)
            moves = count + 1 == group + size
            with contextlib.nullcontext() if moves else self._unsynced():
                losses = self._forward({**batch, "epoch": number})
                (losses["loss"] / size).backward()
            if moves:
                self._move()
            so_far.add(losses, batch["key"])
            step = epoch * self.steps + min(so_far.steps, self.steps)
            curve.tick(step, losses["loss"].detach())
            if moves and count + 1 < steps and self._wants_checkpoint():
                self._write_mid_epoch(epoch)
        if so_far.steps - first != steps:
            raise RuntimeError(
                f"epoch {epoch} had {so_far.steps - first} steps, its rows were counted as {steps}"
            )
        self.so_far = EpochSoFar()
        means = so_far.means.reduce(self.backend.world)
        metrics = {f"train/{k}": v.item() for k, v in means.items()}
        rows = sum(gather(so_far.means.rows, self.backend.world))
        metrics |= {"train/rows": rows, "train/workers": self.backend.world}
        if not math.isfinite(metrics["train/loss"]):
            raise FloatingPointError(
                f"train/loss is {metrics['train/loss']} in epoch {epoch + 1}: lower the learning "
                "rates, or set --fit.clip-norm or --fit.precision fp32."
            )
        return metrics

    def validate(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the task's summary of all validation rows: scalars as `val/...`, and pictures."""
        with self._autocast():
            # Not through DDP, which would wait for the other workers.
            means = evaluate(self.task, self._batches("val", None), self.backend.world)
        return split_summary(self.task.summary(means))

    def adjust(self, metrics: dict[str, int | float]) -> None:
        """Note the learning rates; with plateau, lower them where the validation loss stalls."""
        for index, group in enumerate(self.optimizer.param_groups):
            metrics[f"lr/{index}" if index else "lr"] = float(group["lr"])
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(metrics["val/loss"])

    def save(self, directory: str, epoch: int) -> None:
        """Write `model/` for inference and `state.pt` to resume from."""
        model = os.path.join(directory, checkpoints.MODEL)
        os.makedirs(model)
        self.task.save(model)
        torch.save(self._state(epoch), os.path.join(directory, checkpoints.STATE))

    def _state(self, epoch: int) -> dict[str, object]:
        # By all names: a module that two parts share is in `state_dict` under both.
        named = self.task.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in named if not p.requires_grad}
        weights = {k: v for k, v in self.task.state_dict().items() if k not in frozen}
        return {
            "epoch": epoch,
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def resume(self) -> int:
        """Go on from the latest checkpoint; return the epochs that are done."""
        done = self.load(self.backend.latest())
        begun = mid_epoch.find(self.job.directory)
        if begun is None or begun["epoch"] != done:
            return done
        self.load(mid_epoch.checkpoint(self.job.directory, begun))
        seen = mid_epoch.read_seen(self.job.directory, begun)
        self.so_far = EpochSoFar(begun["steps"], len(seen))
        if self.backend.rank == 0:
            self.so_far.keys = [torch.from_numpy(seen)]
            means = {name: torch.tensor(mean) for name, mean in begun["means"].items()}
            self.so_far.means.add(means, len(seen))
        return done

    def load(self, checkpoint: Checkpoint | None) -> int:
        """Go on from a checkpoint; return the epochs that are done."""
        if checkpoint is None:
            return 0
        state = load_state(self.task, checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        return state["epoch"]

    def _count_left(self) -> int:
        """Return the steps that are left of the epoch."""
        left = self.job.rows - self.so_far.rows
        return count_steps(left, self.backend.world, self.share) if left else 0

    def _wants_checkpoint(self) -> bool:
        """Return whether it is time for a checkpoint, or a node will be taken away.

        The clock is that of rank 0, or workers would not agree.
        """
        if not self.fit.checkpoint_minutes:
            return False
        now = time.monotonic()
        due = now - self.written > 60 * self.fit.checkpoint_minutes
        due, looks = self._agree(due, now - self.looked > LOOK_S)
        if looks:
            self.looked, noticed = now, self.noticed
            self.noticed = self.backend.is_preempted()
            due = due or (self.noticed and not noticed)
        if due:
            self.written = now
        return due

    def _agree(self, *flags: bool) -> list[bool]:
        """Return the flags of rank 0."""
        if self.backend.world == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.uint8, device=self.backend.device)
        torch.distributed.broadcast(shared, 0)
        return [bool(flag) for flag in shared.tolist()]

    def _write_mid_epoch(self, epoch: int) -> None:
        so_far = self.so_far
        means = so_far.means.reduce(self.backend.world)
        seen = torch.cat(gather(torch.cat(so_far.keys), self.backend.world))
        if self.backend.rank == 0:
            scalars = {name: float(mean) for name, mean in means.items()}
            state = self._state(epoch)
            self.writer.write(epoch, so_far.steps, scalars, state, seen.numpy())

    def _batches(self, name: str, epoch: int | None) -> Iterator[dict[str, Tensor]]:
        """Batches of this worker's rows on its device; shuffled by epoch (None: validation)."""
        order = {}
        if epoch is not None and self.fit.shuffle and not self.job.ordered:
            seed = rng.fold_in(self.fit.seed, epoch, f"order {self.backend.rank}") % 2**32
            size = max(self.fit.shuffle, self.share)
            order = {"local_shuffle_buffer_size": size, "local_shuffle_seed": seed}
        size = VALIDATION_BATCH if epoch is None else self.share
        return read_batches(self.backend.shard(name), size, self.backend.device, **order)

    def _forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with self._autocast():
            return self.model(batch)

    def _move(self) -> None:
        if self.fit.clip_norm:
            nn.utils.clip_grad_norm_(self.weights, self.fit.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.schedule, LambdaLR):
            self.schedule.step()

    def _autocast(self) -> torch.autocast:
        return autocast(self.backend.device, self.fit)

    def _unsynced(self) -> contextlib.AbstractContextManager:
        return self.model.no_sync() if self.backend.world > 1 else contextlib.nullcontext()


@torch.no_grad()
def evaluate(task: Any, batches: Iterable[dict[str, Tensor]], world: int = 1) -> dict[str, Tensor]:
    """Return what a task's `summary` takes, of this worker's validation batches and all others'."""
    task.eval()
    means, number = MeanMetrics(), torch.tensor(0)
    for batch in batches:
        means.add(task({**batch, "epoch": number}), len(batch["key"]))
    return means.reduce(world)


def split_summary(
    summary: Mapping[str, float | np.ndarray],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the scalars of a task's summary as `val/...`, and its pictures."""
    pictures = {name: v for name, v in summary.items() if isinstance(v, np.ndarray)}
    scalars = {f"val/{k}": float(v) for k, v in summary.items() if k not in pictures}
    return scalars, pictures


def read_batches(
    rows: Any, size: int, device: torch.device, **order: int
) -> Iterator[dict[str, Tensor]]:
    """Read rows, of a Dataset or a worker's share of one, in batches on a device."""
    for batch in rows.iter_torch_batches(batch_size=size, collate_fn=to_tensors, **order):
        yield {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def autocast(device: torch.device, fit: TrainConfig) -> torch.autocast:
    """Return the context of `fit.precision`."""
    bf16 = fit.precision == "bf16" or (fit.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def load_state(task: nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """Load a checkpoint's weights into a task; return the checkpoint's state.

    Raises:
        ValueError: they are of another model.
    """
    with checkpoint.as_directory() as directory:
        path = os.path.join(directory, checkpoints.STATE)
        state = torch.load(path, map_location="cpu", weights_only=True)
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    keys = task.load_state_dict(state["model"], strict=False)
    wrong = sorted(trained.intersection(keys.missing_keys)) + keys.unexpected_keys
    if wrong:
        raise ValueError(
            f"{checkpoint.path} is of another model: weights {wrong[:5]} do not fit. Choose "
            "another --fit.name, or the settings that the run began with."
        )
    return state


def parameter_groups(task: Task, module: nn.Module) -> list[ParameterGroup]:
    """Return the task's parameter groups without frozen weights.

    Raises:
        ValueError: a weight that is not frozen is in no group, so it would never move.
    """
    groups: list[ParameterGroup] = [
        {**group, "params": [p for p in group["params"] if p.requires_grad]}
        for group in task.groups()
    ]
    grouped = {id(p) for group in groups for p in group["params"]}
    named = module.named_parameters()
    lost = [name for name, p in named if p.requires_grad and id(p) not in grouped]
    if lost:
        raise ValueError(
            f"{type(module).__name__}.groups(): expected every weight that is not frozen, got none "
            f"of {lost[:5]}. Put them in a group, or freeze them with requires_grad_(False)."
        )
    return [group for group in groups if group["params"]]


def build_scheduler(
    optimizer: torch.optim.Optimizer, fit: TrainConfig, steps: int
) -> LambdaLR | ReduceLROnPlateau:
    """Build the schedule of the learning rates; `steps` are those of one epoch."""
    if fit.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=PATIENCE)
    moves = math.ceil(steps / fit.accumulate) * fit.epochs
    warm = round(fit.warmup * moves)

    def factor(move: int) -> float:
        if move < warm:
            return (move + 1) / (warm + 1)
        if fit.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (move - warm) / max(1, moves - warm)))

    return LambdaLR(optimizer, factor)
