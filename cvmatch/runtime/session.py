"""Ray: start it, run actors over rows, refuse what would hang, resume streams.

The rules here answer measured traps of Ray 2.60; each one says which.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray._private import ray_constants, state
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data.checkpoint import CheckpointConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvmatch.data import storage
from cvmatch.runtime.settings import Pool

T = TypeVar("T")
R = TypeVar("R")

NO_PROGRESS_S = 300.0
"""Seconds without a finished block after which a stream fails (Ray waits 1800)."""

READERS = 1.0
"""CPUs that a stream needs beside its pools, to read and to write."""

FILTER = 1.0
"""CPU of the actor that leaves out finished rows when a stream resumes."""

_SHORT_PAUSE_S, _PAUSE_S = 0.005, 0.05  # at first and at most, of `Unhurried`


def start(logical_cpus: int = 8, dashboard: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS (`ray job submit` sets it), else start Ray on this machine.

    `logical_cpus` (of a local Ray) is bookkeeping: with fewer than about six, pools starve their
    readers, however many cores there are. Only searches over Train workers need the `dashboard`.
    A second call in a process changes nothing but the settings of Ray Data.
    """
    if not ray.is_initialized():
        # Read when ray is imported, so the variable alone would be too late here: a driver under
        # `uv run` would make every worker build an environment of its own.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        # A stream that is stopped early (`take`) cancels its tasks, which is no error.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            # Ray ends workers that idle for a second, and starting one takes 2 to 10 s of a core:
            # between the steps of a short stage that was most of the time.
            os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "30000")
            os.environ.setdefault("RAY_num_workers_soft_limit", str(2 * logical_cpus))
            # "local": never join a Ray that somebody else runs on this machine.
            ray.init("local", num_cpus=logical_cpus, include_dashboard=dashboard, **quiet)
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Unhurried]
    # The second version lists files in tasks that start tasks: 7 s for one small file, against 2.
    context.use_datasource_v2 = False
    # It raises what it logs as an error, and calls the end by a `flow.Step` a bug of Ray.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class Unhurried(ExecutionCallback):
    """A pause in each turn of the loop with which Ray Data watches over a stream.

    The loop waits for tasks to finish, but not where finished ones wait for whoever takes their
    rows: then it turns as fast as it can, in a thread of that very process. A training step of the
    toy generator, fed by a stream, took 1.7 s; with this 0.45 s; with all rows in memory 0.35 s.
    """

    def __init__(self) -> None:
        self.pause = _SHORT_PAUSE_S

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Sleep: the longer, the longer rows lie there that nobody takes."""
        waited_for = executor._consumer_idling()
        self.pause = _SHORT_PAUSE_S if waited_for else min(2 * self.pause, _PAUSE_S)
        time.sleep(self.pause)


def map_actors(rows: Dataset, actor: type, pool: Pool, **constructor: Any) -> Dataset:
    """Run `actor(**constructor)` over batches (dict of arrays, maybe read-only) in a pool."""
    return rows.map_batches(
        actor,
        fn_constructor_kwargs=constructor,
        batch_size=pool.batch,
        batch_format="numpy",
        compute=ActorPoolStrategy(
            min_size=pool.size,
            max_size=pool.largest,
            max_concurrent_calls_per_actor=pool.calls,
            enable_true_multi_threading=pool.calls > 1,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        label_selector={"pool": pool.label} if pool.label else None,
    )


def preflight(*pools: Pool) -> None:
    """Check that the pools of one stream leave CPUs for its readers and fit the GPUs.

    Raises:
        ValueError: they do not; the stream would hang without a word.
    """
    resuming = DataContext.get_current().checkpoint_config is not None
    spare = READERS + (FILTER if resuming else 0.0)
    cpus = sum(pool.largest * pool.cpus for pool in pools)
    gpus = sum(pool.largest * pool.gpus for pool in pools)
    require(cpus + spare, gpus, f"Pools of {cpus:g} CPUs and {spare:g} more to read and write")


def require(
    cpus: float,
    gpus: float | int,
    what: str,
    cpus_flag: str = "--pool.cpus",
    gpus_flag: str = "--pool.gpus",
) -> None:
    """Check that the cluster, as large as its autoscaler may make it, has the resources.

    The flags are those of the caller's job, for the advice.

    Raises:
        ValueError: it has not; says how many, and what to change.
    """
    have_cpus, have_gpus = capacity("CPU"), capacity("GPU")
    if cpus > have_cpus + 1e-6:
        raise ValueError(
            f"{what} need {cpus:g} CPUs, the cluster has {have_cpus:g}: it would hang. Use smaller "
            f"pools or fewer workers, or less CPU for each ({cpus_flag}); "
            "a local Ray counts logical CPUs (engine.start)."
        )
    if gpus > have_gpus + 1e-6:
        raise ValueError(
            f"{what} need {gpus:g} GPUs, the cluster has {have_gpus:g}: it would wait for ever. "
            f"Use fewer GPUs ({gpus_flag}), or none: {gpus_flag} 0."
        )


def capacity(resource: str) -> float:
    """How much of a resource the cluster has, or may get from its autoscaler."""
    now = ray.cluster_resources().get(resource, 0.0)
    later = state.state.get_max_resources_from_cluster_config() or {}
    return max(now, float(later.get(resource, 0.0)))


@contextlib.contextmanager
def resumable(path: str, column: str = "pair_id") -> Iterator[None]:
    """Streams made inside resume where a killed run of them stopped (Read -> ... -> Write plans).

    `path` keeps the ids of written rows, and must be the same next time; `column` is the unique id.
    Finished rows stay recorded, so that a finished stream that is run again does nothing.
    """
    context = DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        column, storage.absolute(path), delete_checkpoint_on_success=False
    )
    try:
        yield
    finally:
        context.checkpoint_config = before


def tasks(
    function: Callable[[T], R], items: Sequence[T], cpus: float = 1.0, here: bool = False
) -> list[R]:
    """Results of a function that may run twice, in the order of the items, each in a task of Ray.

    A task whose worker dies runs again, three times at most. `here`: on this node, since it needs
    its files.
    """
    strategy: Any = _here() if here else "DEFAULT"
    remote = ray.remote(num_cpus=cpus, max_retries=3, scheduling_strategy=strategy)(function)
    return ray.get([remote.remote(item) for item in items])


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
