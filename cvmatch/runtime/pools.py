"""Run actors and tasks over rows, and refuse what the cluster is too small for.

Workarounds for Ray 2.60: a stream whose pools hold every CPU starves its reader and hangs.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayTaskError

from cvmatch.runtime import internals, session
from cvmatch.runtime.settings import Pool

T = TypeVar("T")
R = TypeVar("R")

READERS = 1.0
"""CPUs that a stream needs beside its pools, to read and to write."""

FILTER = 1.0
"""CPU of the actor that leaves out finished rows when a stream resumes."""


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


def map_tasks(function: Callable[[T], R], items: Sequence[T], cpus: float = 1.0) -> list[R]:
    """Return `function` of each item, in their order, each computed in a task of Ray.

    A task whose worker dies runs again, three times at most, so the function must bear that.

    Args:
        function: what to compute.
        items: its arguments.
        cpus: logical CPUs of a task.

    Raises:
        ValueError: as a task does.
    """
    remote = ray.remote(num_cpus=cpus, max_retries=3)(function)
    try:
        return ray.get([remote.remote(item) for item in items])
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):  # of the input, not of the code: in a line
            raise ValueError(str(error.cause)) from error
        raise


def preflight(pools: Mapping[str, Pool]) -> None:
    """Check that the pools of one stream leave CPUs for its readers and fit the GPUs.

    Args:
        pools: by the flag of this job that they are set with, such as `generate.pool`.

    Raises:
        ValueError: they do not; the stream would hang without a word.
    """
    resuming = DataContext.get_current().checkpoint_config is not None
    spare = READERS + (FILTER if resuming else 0.0)
    cpus = {name: pool.largest * pool.cpus for name, pool in pools.items()}
    gpus = {name: pool.largest * pool.gpus for name, pool in pools.items()}
    require_resources(
        sum(cpus.values()) + spare,
        sum(gpus.values()),
        f"Pools of {sum(cpus.values()):g} CPUs and {spare:g} more to read and write",
        " and ".join(f"--{name}.cpus" for name in cpus) or "this job's workers",
        " and ".join(f"--{name}.gpus" for name, count in gpus.items() if count),
    )


def require_resources(
    cpus: float, gpus: float | int, purpose: str, cpus_flag: str, gpus_flag: str
) -> None:
    """Check that the cluster, as large as its autoscaler may make it, has the resources.

    Args:
        cpus: logical CPUs that are needed.
        gpus: GPUs that are needed.
        purpose: what needs them.
        cpus_flag: the caller's flags that set them, for the advice.
        gpus_flag: the same for GPUs.

    Raises:
        ValueError: it has not; says how many, and what to change.
    """
    cluster_cpus, cluster_gpus = cluster_capacity("CPU"), cluster_capacity("GPU")
    if cpus > cluster_cpus + 1e-6:
        raise ValueError(
            f"{purpose} need {cpus:g} CPUs, the cluster has {cluster_cpus:g}: it would hang. Use "
            f"smaller pools or fewer workers, or less CPU for each ({cpus_flag}); "
            "a local Ray counts logical CPUs (session.start)."
        )
    if gpus > cluster_gpus + 1e-6:
        raise ValueError(
            f"{purpose} need {gpus:g} GPUs, the cluster has {cluster_gpus:g}: it would wait for "
            f"ever. Use fewer GPUs ({gpus_flag}), or none: {gpus_flag} 0."
        )


def cluster_capacity(resource: str) -> float:
    """Return how much of a resource the cluster has, or may get from its autoscaler.

    Before a local Ray is started, that is what it will have.
    """
    if not ray.is_initialized():
        if not os.environ.get("RAY_ADDRESS"):
            gpus = torch.cuda.device_count()
            return float({"CPU": session.LOGICAL_CPUS, "GPU": gpus}.get(resource, 0))
        session.start()
    now = ray.cluster_resources().get(resource, 0.0)
    return max(now, float(internals.max_cluster_resources().get(resource, 0.0)))


def free_gpus() -> float:
    """Return how many GPUs of the cluster, as large as it is now, nothing has taken."""
    session.start()
    return float(int(ray.available_resources().get("GPU", 0.0)))
