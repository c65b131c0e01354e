"""Start or resume a training run, and publish its model."""

import contextlib
import functools
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import is_dataclass
from typing import Any

import torch
from pyarrow import fs
from ray import cloudpickle
from ray.data import Dataset
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.runtime import hardware, pools, progress, tracking
from cvmatch.training import checkpoints, loop, metrics
from cvmatch.training.settings import Fit
from cvmatch.training.task import Order, Task

_log = logging.getLogger(__name__)

_FREE = {"epochs", "workers", "cpus_per_worker", "gpus_per_worker", "label", "storage", "name"}
_FREE |= {"keep", "best", "best_mode", "max_failures", "cache"}
"""Fields of Fit that may change when a run is resumed."""

_listeners: ContextVar[tuple[UserCallback, ...]] = ContextVar("cvmatch_listeners", default=())


def fit(
    build: Callable[[], Task],
    train: Dataset,
    val: Dataset | None,
    fit: Fit,
    run: tracking.Run | None = None,
    order: Order | None = None,
    made_from: str = "",
) -> Result:
    """Train what `build` gives, or go on where a run of that name stopped.

    With `order`, its rows take the place of `train` from the first epoch on, unshuffled, and are
    asked for again every few epochs. `made_from` is a hash of what the rows hold, which their
    location does not tell: with another one it is another run.

    The rows hold numeric tensor columns and `key` (int64, `rng.row_key` of the id). A finished run
    that is started again gives its result at once. The result's checkpoint (`model/`, `state.pt`)
    and metrics are those of the best epoch by `fit.best`, else of the last.

    Raises:
        ValueError: the rows are no tensors or too few, the cluster is too small, or the name is
            that of a run with other settings.
    """
    name = fit.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    location = storage.join(storage.absolute(fit.storage), name)
    directory = checkpoints.RunDirectory(
        location=location,
        keep=fit.keep,
        best=fit.best,
        mode=fit.best_mode,
        every=fit.validate_every,
    )
    _check(train, val, fit)
    directory.claim(_identity(build, fit) | ({"rows made from": made_from} if made_from else {}))
    done = directory.latest()
    if done >= fit.epochs:
        _log.info("%s is finished: %d epochs", location, done)
        return directory.result()
    val = val and cached(val, fit)
    callbacks = [checkpoints.Recorder(directory, run), *(_listeners.get() if run else ())]
    while done < fit.epochs:
        rows, until = train, fit.epochs
        if order is not None:
            rows = order.rows(directory.model(done) if done else "", done)
            until = min(fit.epochs, (done // order.every + 1) * order.every)
        rows = cached(rows, fit)
        job = loop.Job(
            build=build,
            fit=fit,
            steps=_steps(rows.count(), fit),
            validate=val is not None,
            directory=location,
            resume=done,
            until=until,
            ordered=order is not None,
        )
        _segment(job, {"train": rows} | ({"val": val} if val else {}), directory, callbacks, name)
        done = until
    return directory.result()


def _segment(
    job: loop.Job,
    datasets: dict[str, Dataset],
    directory: checkpoints.RunDirectory,
    callbacks: list[UserCallback],
    name: str,
) -> None:
    """Epochs from `job.resume` to `job.until`."""
    seen = functools.partial(_progress, storage.join(job.directory, checkpoints.PROGRESS))
    total = job.steps * job.fit.epochs
    with progress.watch(f"train {name}", total, lambda: seen()["step"], lambda: _note(seen())):
        if job.fit.workers:
            _trainer(job, datasets, callbacks, name).fit()
        else:
            loop.run(job, Here(job, datasets, directory, callbacks))


def cached(rows: Dataset, fit: Fit) -> Dataset:
    """The rows, decoded once and kept where `fit.cache` says so; for what reads them before `fit`.

    Twice costs nothing.
    """
    return rows.materialize() if fit.cache else rows


def preflight(fit: Fit) -> None:
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


def publish(result: Result, output: str) -> str:
    """Put the model of the result's checkpoint at `output`, whole or not at all; gives `output`.

    What was there before is replaced.
    """
    if result.checkpoint is None:
        raise ValueError(f"{output}: expected a result with a checkpoint, got none")
    source = storage.join(result.checkpoint.path, checkpoints.MODEL)
    checkpoints.copy_tree(result.checkpoint.filesystem, source, output)
    return output


@contextlib.contextmanager
def listening(*callbacks: UserCallback) -> Iterator[None]:
    """Fits in the block that have a `run` also call these after each epoch (a search does so)."""
    token = _listeners.set(callbacks)
    try:
        yield
    finally:
        _listeners.reset(token)


class Here:
    """This process as the only worker.

    Not through Ray's own local mode, whose reports and callbacks go nowhere and which raises in a
    trial of Ray Tune (2.60).
    """

    rank = 0
    world = 1

    def __init__(
        self,
        job: loop.Job,
        datasets: dict[str, Dataset],
        directory: checkpoints.RunDirectory,
        callbacks: list[UserCallback],
    ) -> None:
        self.job, self.datasets = job, datasets
        self.directory, self.callbacks = directory, callbacks
        hardware.keep_freed_memory()
        self.device: torch.device = hardware.device()

    def shard(self, name: str) -> Dataset:
        """All rows."""
        return self.datasets[name]

    def commit(self, metrics: dict[str, Any], directory: str) -> None:
        """Put the checkpoint in its place, then tell of it."""
        checkpoint = self.directory.checkpoint(metrics["epoch"])
        checkpoints.copy_tree(fs.LocalFileSystem(), directory, checkpoint.path)
        for callback in self.callbacks:
            callback.after_report(None, [metrics], checkpoint)  # pyright: ignore[reportArgumentType]
        self.directory.prune()

    def latest(self) -> Checkpoint | None:
        """What earlier starts left."""
        return loop.resumed(self.job)


class Shards(DataConfig):
    """Equal shares of `train`, and all of `val` in uneven ones: an equal split drops rows."""

    def __init__(self) -> None:
        options = DataConfig.default_ingest_options()
        options.preserve_order = True  # or the order of rows is another in each run
        super().__init__(datasets_to_split=["train"], execution_options=options)

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """The shards of each worker."""
        shards = super().configure(datasets, world_size, *args, **kwargs)
        if "val" in datasets:
            val = datasets["val"].streaming_split(world_size, equal=False)
            for shard, part in zip(shards, val, strict=True):
                shard["val"] = part
        return shards


def _trainer(
    job: loop.Job, datasets: dict[str, Dataset], callbacks: list[UserCallback], name: str
) -> TorchTrainer:
    fit = job.fit
    preflight(fit)
    resources = {"CPU": fit.cpus_per_worker, "GPU": fit.gpus_per_worker}
    scaling = ScalingConfig(
        num_workers=fit.workers,
        use_gpu=fit.gpus_per_worker > 0,
        resources_per_worker={name: count for name, count in resources.items() if count},
        label_selector={"pool": fit.label} if fit.label else None,
    )
    # Unlimited, Ray would try for ever to start workers that do not fit, a minute each time.
    failures = FailureConfig(max_failures=fit.max_failures, controller_failure_limit=3)
    kept = CheckpointConfig(
        num_to_keep=fit.keep,
        checkpoint_score_attribute=fit.best or None,
        checkpoint_score_order=fit.best_mode,
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
        dataset_config=Shards(),
    )


def _work(config: dict[str, bytes]) -> None:
    job = cloudpickle.loads(config["job"])  # the driver's own words: Ray unpickles all else it said
    loop.run(job, loop.Worker(job))


def _check(train: Dataset, val: Dataset | None, fit: Fit) -> None:
    if val is None and fit.schedule == "plateau":
        raise ValueError("fit: schedule plateau watches the validation loss: pass validation rows.")
    if val is None and fit.best.startswith("val/"):
        raise ValueError(f"fit: best {fit.best!r} is of validation rows: pass some.")
    schema = train.schema(fetch_if_missing=False)
    if schema is not None:
        types = zip(schema.names, map(str, schema.types), strict=True)
        wrong = {name: kind for name, kind in types if "string" in kind or "binary" in kind}
        if wrong:
            raise ValueError(metrics.bad_columns(wrong))


def _steps(rows: int, fit: Fit) -> int:
    """Steps of an epoch of one worker; a last row alone makes none, nor do `rows` % workers."""
    own = rows // max(fit.workers, 1)
    if own < min(2, fit.share):
        raise ValueError(
            f"training rows: expected at least 2 for each worker, got {rows} in all. Check the "
            "location and --data.limit."
        )
    return own // fit.share + (own % fit.share > 1)


def _identity(build: Callable[[], Task], fit: Fit) -> dict[str, Any]:
    """What a run is, so that another is not resumed in its place.

    Fields of Fit that shape the training, and what `build` (a `functools.partial`) is made with.
    """
    found = {f"fit.{k}": v for k, v in configs.flat(fit).items() if k not in _FREE}
    made = build if isinstance(build, functools.partial) else functools.partial(build)
    found["task"] = getattr(made.func, "__qualname__", type(made.func).__name__)
    plain = []
    for value in (*made.args, *made.keywords.values()):
        if is_dataclass(value):
            names = configs.flat(value)
            # Pools say where work is done, not what comes out.
            free = ("fit.", "output", "encode_pool.")
            found |= {k: v for k, v in names.items() if not k.startswith(free)}
        elif isinstance(value, str | int | float | tuple | list | None):
            plain.append(value)
    found["arguments"] = hashlib.sha256(repr(plain).encode()).hexdigest()[:16]
    return found


def _progress(location: str) -> dict[str, Any]:
    if not storage.exists(location):
        return {"step": 0}
    return storage.read_json(location)


def _note(progress: dict[str, Any]) -> str:
    if not progress["step"]:
        return ""
    return f"epoch {progress['epoch']}/{progress['epochs']}  loss {progress['loss']:.4g}"
