"""Start or resume a training run, and publish its model."""

import contextlib
import functools
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import is_dataclass
from typing import Any

import torch
from pyarrow import fs
from ray import cloudpickle
from ray.data import DataIterator, Dataset
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from torch import nn

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.runtime import hardware, pools, progress, tracking
from cvmatch.runtime.settings import Pool
from cvmatch.training import checkpoints, loop, metrics, mid_epoch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.process_group import ClusterTorchConfig
from cvmatch.training.settings import TrainConfig, is_score
from cvmatch.training.task import VALIDATION_BATCH, EpochOrder, Task

_log = logging.getLogger(__name__)

_FREE = {"epochs", "workers", "cpus_per_worker", "gpus_per_worker", "label", "storage", "name"}
_FREE |= {"best", "max_failures", "cache", "max_workers", "checkpoint_minutes"}
"""Fields of TrainConfig that may change when a run is resumed."""

LazyRows = Dataset | Callable[[], Dataset]
"""Rows, or what makes them whenever workers are started: the rest of an epoch is another then."""

_listeners: ContextVar[tuple[UserCallback, ...]] = ContextVar("cvmatch_listeners", default=())


def train(
    build: Callable[[], Task],
    train: Dataset,
    val: Dataset | None,
    fit: TrainConfig,
    run: tracking.Run | None = None,
    order: EpochOrder | None = None,
    input_fingerprint: str = "",
) -> TrainResult:
    """Train a task, or go on where a run of that name stopped.

    A finished run that is started again returns its result at once.

    Args:
        build: makes the task, in each worker.
        train: rows of numeric tensor columns and `key` (int64, `rng.row_key` of the id).
        val: such rows for validation.
        fit: settings of the run.
        run: the MLflow run that each epoch is logged to.
        order: makes rows that take the place of `train`, unshuffled, every few epochs.
        input_fingerprint: content hash of the data; a different hash is another run.

    Returns:
        Metrics and checkpoint (`model/`, `state.pt`) of the best epoch by `fit.best`, else of the
        last.

    Raises:
        ValueError: the rows are no tensors or too few, the cluster is too small, or the name is
            that of a run with other settings.
    """
    name = fit.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    location = storage.join(storage.absolute(fit.storage), name)
    directory = checkpoints.RunDirectory(location=location, best=fit.best)
    _check(train, val, fit)
    directory.begin_or_resume(_identity(build, fit, input_fingerprint))
    done = directory.latest()
    if done >= fit.epochs:
        _log.info("%s is finished: %d epochs", location, done)
        return directory.result()
    val = val and cache_rows(val, fit)
    callbacks = [checkpoints.RunRecorder(directory, run), *(_listeners.get() if run else ())]
    while done < fit.epochs:
        rows, until = train, fit.epochs
        if order is not None:
            rows = order.rows(directory.model(done) if done else "", done)
            until = min(fit.epochs, (done // order.every + 1) * order.every)
        rows = cache_rows(rows, fit)
        job = loop.TrainJob(
            build=build,
            fit=fit,
            rows=_count_rows(rows, fit),
            validate=val is not None,
            directory=location,
            resume=done,
            until=until,
            ordered=order is not None,
        )
        datasets = {"train": rows, "rest": functools.partial(mid_epoch.select_rest, rows, location)}
        _run_epochs(job, datasets | ({"val": val} if val else {}), directory, callbacks, name)
        done = until
    return directory.result()


def measure(
    build: Callable[[], Task], val: Dataset, fit: TrainConfig, checkpoint: str
) -> dict[str, float]:
    """Measure a checkpoint on rows that its training need not have seen, in this process.

    Args:
        build: makes the task.
        val: rows, as `train` takes for validation.
        fit: settings of the run.
        checkpoint: location, as of `TrainResult`.

    Returns:
        The `val/...` that a training with these rows for validation would report.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    device = hardware.device()
    task = build()
    assert isinstance(task, nn.Module)
    loop.load_state(task, Checkpoint(checkpoint))
    task = task.to(device)
    with loop.autocast(device, fit):
        means = loop.evaluate(task, loop.read_batches(val, VALIDATION_BATCH, device))
    return loop.split_summary(task.summary(means))[0]


def has_begun(fit: TrainConfig) -> bool:
    """Return whether a run of this name and storage has begun."""
    location = storage.join(storage.absolute(fit.storage), fit.name)
    return bool(fit.name) and storage.exists(storage.join(location, checkpoints.LEDGER))


def _run_epochs(
    job: loop.TrainJob,
    datasets: Mapping[str, LazyRows],
    directory: checkpoints.RunDirectory,
    callbacks: list[UserCallback],
    name: str,
) -> None:
    """Run the epochs from `job.resume` to `job.until`."""
    read = functools.partial(_read_progress, storage.join(job.directory, checkpoints.PROGRESS))
    fit = job.fit
    workers = max(fit.workers, 1)
    total = loop.count_steps(job.rows, workers, fit.batch // workers) * fit.epochs
    with progress.watch(f"train {name}", total, lambda: read()["step"], lambda: _note(read())):
        if fit.workers:
            _trainer(job, datasets, callbacks, name).fit()
        else:
            loop.run_epochs(job, LocalBackend(job, datasets, directory, callbacks))


def cache_rows(rows: Dataset, fit: TrainConfig) -> Dataset:
    """Keep the decoded rows in the object store where `fit.cache` says so; twice costs nothing."""
    return rows.materialize() if fit.cache else rows


def preflight(fit: TrainConfig) -> None:
    """Check that the cluster has what the workers need, before anything is read or started.

    Raises:
        ValueError: it has not, or GPUs are asked for without workers; says which flags to change.
    """
    if fit.gpus_per_worker and not fit.workers:
        raise ValueError(
            f"fit: expected workers with {fit.gpus_per_worker} GPUs each, got 0 workers. Pass "
            "--fit.workers 1, or leave out --fit.gpus-per-worker: without workers, the training "
            "runs in this process and takes its GPU if there is one."
        )
    if fit.workers:
        pools.require_resources(
            fit.workers * fit.cpus_per_worker + pools.READERS,
            fit.workers * fit.gpus_per_worker,
            f"{fit.workers} training workers and {pools.READERS:g} CPU to read",
            "--fit.cpus-per-worker",
            "--fit.gpus-per-worker",
        )
        if fit.label:
            pools.require_resources(
                fit.workers * fit.cpus_per_worker,
                fit.workers * fit.gpus_per_worker,
                f"{fit.workers} training workers",
                "--fit.cpus-per-worker",
                "--fit.gpus-per-worker",
                fit.label,
            )


def actors(fit: TrainConfig, batch: int, purpose: str) -> Pool:
    """Return as many actors as a training has workers, with their GPUs, for when it does not run.

    Without workers, that is one actor, with a GPU if one is free (a trial holds its own).

    Args:
        fit: settings of the training.
        batch: rows a call.
        purpose: what they do, for the error.

    Raises:
        ValueError: the cluster is too small for them.
    """
    gpus = float(fit.gpus_per_worker) if fit.workers else min(1.0, pools.free_gpus())
    pool = Pool(size=max(1, fit.workers), batch=batch, gpus=gpus, label=fit.label or None)
    pools.require_resources(
        pool.size * pool.cpus + pools.READERS + pools.FILTER,
        pool.size * pool.gpus,
        purpose,
        "--fit.workers",
        "--fit.gpus-per-worker",
    )
    return pool


def publish(result: TrainResult, output: str) -> str:
    """Put the model of the result's checkpoint at `output`, whole or not at all; return `output`.

    What was there before is replaced.
    """
    filesystem, path = storage.resolve(storage.join(result.checkpoint, checkpoints.MODEL))
    checkpoints.copy_tree(filesystem, path, output)
    return output


@contextlib.contextmanager
def report_to(*callbacks: UserCallback) -> Iterator[None]:
    """Call these after each epoch of the trainings in the block that have a `run`."""
    token = _listeners.set(callbacks)
    try:
        yield
    finally:
        _listeners.reset(token)


class LocalBackend:
    """This process as the only worker (`TrainConfig.workers` = 0).

    What Ray Train does for workers is done here: the checkpoint is copied, and the callbacks are
    called. Ray's own local mode does neither (2.60, `LocalTorchController`), and raises in a trial
    of Ray Tune.
    """

    rank = 0
    world = 1

    def __init__(
        self,
        job: loop.TrainJob,
        datasets: Mapping[str, LazyRows],
        directory: checkpoints.RunDirectory,
        callbacks: list[UserCallback],
    ) -> None:
        self.job, self.datasets = job, datasets
        self.directory, self.callbacks = directory, callbacks
        hardware.keep_freed_memory()
        self.device: torch.device = hardware.device()

    def shard(self, name: str) -> Dataset:
        """All rows."""
        rows = self.datasets[name]
        return rows() if callable(rows) else rows

    def commit(self, metrics: dict[str, int | float], directory: str) -> None:
        """Put the checkpoint in its place, then tell of it."""
        epoch = int(metrics["epoch"])
        checkpoints.copy_tree(fs.LocalFileSystem(), directory, self.directory.place(epoch))
        checkpoint = self.directory.checkpoint(epoch)
        for callback in self.callbacks:
            callback.after_report(None, [metrics], checkpoint)  # pyright: ignore[reportArgumentType]
        self.directory.prune()

    def latest(self) -> Checkpoint | None:
        """What earlier starts left."""
        return loop.starting_checkpoint(self.job)

    def is_preempted(self) -> bool:
        """Return False: nothing tells this process of it."""
        return False


class SplitDatasets(DataConfig):
    """Equal shares of training rows, and all of `val` in uneven ones: an equal split drops rows."""

    def __init__(self) -> None:
        options = DataConfig.default_ingest_options()
        options.preserve_order = True  # or the order of rows is another in each run
        super().__init__(datasets_to_split=["train", "rest"], execution_options=options)

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """The shards of each worker."""
        shards = super().configure(datasets, world_size, *args, **kwargs)
        if "val" in datasets:
            val = datasets["val"].streaming_split(world_size, equal=False)
            for shard, part in zip(shards, val, strict=True):
                shard["val"] = part
        return shards


def _trainer(
    job: loop.TrainJob, datasets: Mapping[str, LazyRows], callbacks: list[UserCallback], name: str
) -> TorchTrainer:
    fit = job.fit
    preflight(fit)
    resources = {"CPU": fit.cpus_per_worker, "GPU": fit.gpus_per_worker}
    scaling = ScalingConfig(
        num_workers=(fit.workers, fit.max_workers) if fit.max_workers else fit.workers,
        use_gpu=fit.gpus_per_worker > 0,
        resources_per_worker={name: count for name, count in resources.items() if count},
        label_selector={pools.LABEL: fit.label} if fit.label else None,
    )
    # Unlimited, Ray would try for ever to start workers that do not fit, a minute each time.
    failures = FailureConfig(max_failures=fit.max_failures, controller_failure_limit=3)
    kept = CheckpointConfig(
        num_to_keep=checkpoints.RunDirectory.keep,
        checkpoint_score_attribute=fit.best or None,
        checkpoint_score_order="max" if is_score(fit.best) else "min",
    )
    return TorchTrainer(
        _work,
        # Packed, since Ray's controller need not import the model's libraries (8 s of a core).
        train_loop_config={"job": cloudpickle.dumps(job)},
        scaling_config=scaling,
        run_config=RunConfig(
            name=name,
            storage_path=storage.absolute(fit.storage),
            failure_config=failures,
            checkpoint_config=kept,
            callbacks=callbacks,
        ),
        datasets=dict(datasets),
        dataset_config=SplitDatasets(),
        torch_config=ClusterTorchConfig(),
    )


def _work(config: dict[str, bytes]) -> None:
    job = cloudpickle.loads(config["job"])  # trusted: pickled by our own driver
    loop.run_epochs(job, loop.RayTrainBackend(job))


def _check(train: Dataset, val: Dataset | None, fit: TrainConfig) -> None:
    if val is None and fit.schedule == "plateau":
        raise ValueError("fit: schedule plateau watches the validation loss: pass validation rows.")
    if val is None and fit.best.startswith("val/"):
        raise ValueError(f"fit: best {fit.best!r} is of validation rows: pass some.")
    schema = train.schema(fetch_if_missing=False)
    if schema is not None:
        types = zip(schema.names, map(str, schema.types), strict=True)
        wrong = {name: kind for name, kind in types if "string" in kind or "binary" in kind}
        if wrong:
            raise ValueError(metrics.column_error(wrong))


def _count_rows(rows: Dataset, fit: TrainConfig) -> int:
    """Count the training rows; each worker needs a step's share, or two."""
    count, workers = rows.count(), fit.most_workers
    if count // workers < min(2, fit.batch // workers):
        raise ValueError(
            f"training rows: expected at least 2 for each worker, got {count} in all. Check the "
            "location and the limit, if it has one (this job's flag that ends in .limit)."
        )
    return count


def _identity(
    build: Callable[[], Task], fit: TrainConfig, input_fingerprint: str
) -> dict[str, object]:
    """Return what a run is, so that another is not resumed in its place.

    Fields of TrainConfig that shape the training, what `build` (a `functools.partial`) is made
    with, and the data.
    """
    identity = {f"fit.{k}": v for k, v in configs.flat(fit).items() if k not in _FREE}
    partial = build if isinstance(build, functools.partial) else functools.partial(build)
    identity["task"] = getattr(partial.func, "__qualname__", type(partial.func).__name__)
    plain = []
    for value in (*partial.args, *partial.keywords.values()):
        if is_dataclass(value):
            names = configs.flat(value)
            identity |= {k: v for k, v in names.items() if not k.startswith(("fit.", "output"))}
        elif isinstance(value, str | int | float | tuple | list | None):
            plain.append(value)
    identity["input_fingerprint"] = input_fingerprint
    identity["arguments"] = hashlib.sha256(repr(plain).encode()).hexdigest()[:16]
    return identity


def _read_progress(location: str) -> checkpoints.Progress:
    if not storage.exists(location):
        return {"step": 0, "steps": 0, "epoch": 0, "epochs": 0, "loss": math.nan}
    return storage.read_json(location)


def _note(progress: checkpoints.Progress) -> str:
    if not progress["step"]:
        return ""
    return f"epoch {progress['epoch']}/{progress['epochs']}  loss {progress['loss']:.4g}"
