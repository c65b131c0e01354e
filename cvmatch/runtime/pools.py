"""Run actors and tasks over rows, and refuse what the cluster is too small for.

Workarounds for Ray 2.60: a stream whose pools hold every CPU starves its reader and hangs.
"""

import logging
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

_log = logging.getLogger(__name__)

READERS = 1.0
"""CPUs that a stream needs beside its pools, to read and to write."""

LABEL = "pool"
"""Name of the label of nodes (cluster.yaml) whose values the settings name."""

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
        label_selector={LABEL: pool.label} if pool.label else None,
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
    for label in {pool.label for pool in pools.values() if pool.label}:
        held = {name: pool for name, pool in pools.items() if pool.label == label}
        _require_pools(held, 0.0, label)
    _require_pools(pools, spare)


def describe(pool: Pool) -> str:
    """Return `4 to 8 actors of 0.5 CPUs and 1 GPUs, on 2 nodes of pool=gpu-generate`."""
    nodes = _live_nodes(pool.label or "")
    size = f"{pool.size}" if pool.largest == pool.size else f"{pool.size} to {pool.largest}"
    gpus = f" and {pool.gpus:g} GPUs" if pool.gpus else ""
    where = f" of {LABEL}={pool.label}" if pool.label else ""
    return f"{size} actors of {pool.cpus:g} CPUs{gpus}, on {len(nodes)} nodes{where}"


def _require_pools(pools: Mapping[str, Pool], spare: float, label: str = "") -> None:
    """Check the actors that pools begin with: Ray adds more only where there is room."""
    cpus = {name: pool.size * pool.cpus for name, pool in pools.items()}
    gpus = {name: pool.size * pool.gpus for name, pool in pools.items()}
    require_resources(
        sum(cpus.values()) + spare,
        sum(gpus.values()),
        f"Pools of {sum(cpus.values()):g} CPUs"
        + (f" and {spare:g} more to read and write" if spare else ""),
        " and ".join(f"--{name}.cpus" for name in cpus) or "this job's workers",
        " and ".join(f"--{name}.gpus" for name, count in gpus.items() if count),
        label,
    )


def require_resources(
    cpus: float,
    gpus: float | int,
    purpose: str,
    cpus_flag: str,
    gpus_flag: str,
    label: str = "",
) -> None:
    """Check that the cluster, as large as its autoscaler may make it, has the resources.

    Args:
        cpus: logical CPUs that are needed.
        gpus: GPUs that are needed.
        purpose: what needs them.
        cpus_flag: the caller's flags that set them, for the advice.
        gpus_flag: the same for GPUs.
        label: value of the label `pool` of the nodes that must have them; empty: any node.

    Raises:
        ValueError: it has not; says how many, and what to change.
    """
    if label and not _has_nodes(label):
        return
    cluster_cpus, cluster_gpus = cluster_capacity("CPU", label), cluster_capacity("GPU", label)
    where = f"the nodes of label pool={label} have" if label else "the cluster has"
    if cpus > cluster_cpus + 1e-6:
        raise ValueError(
            f"{purpose} need {cpus:g} CPUs, {where} {cluster_cpus:g}: it would hang. Use "
            f"smaller pools or fewer workers, or less CPU for each ({cpus_flag}); "
            "a local Ray counts logical CPUs (session.start)."
        )
    if gpus > cluster_gpus + 1e-6:
        raise ValueError(
            f"{purpose} need {gpus:g} GPUs, {where} {cluster_gpus:g}: it would wait for "
            f"ever. Use fewer GPUs ({gpus_flag}), or none: {gpus_flag} 0."
        )


def _has_nodes(label: str) -> bool:
    """Return whether nodes of the label run; False: the autoscaler may start some.

    Raises:
        ValueError: no node has it, and there is no autoscaler.
    """
    session.start()
    if _live_nodes(label):
        return True
    known = sorted({node["Labels"].get(LABEL, "") for node in _live_nodes()} - {""})
    if not internals.max_cluster_resources():
        raise ValueError(
            f"label {label!r}: expected nodes that were started with --labels={LABEL}={label} "
            f"(cluster.yaml), but the nodes of this cluster have {known or 'no such label'}. Pass "
            "another label, or none, for a stage that may run anywhere."
        )
    _log.warning("no node has the label %s=%s yet: waiting for the autoscaler", LABEL, label)
    return False


def _live_nodes(label: str = "") -> list[dict[str, Any]]:
    """Return what Ray knows of the nodes that run, of one label or of all."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if not label or node["Labels"].get(LABEL) == label]


def cluster_capacity(resource: str, label: str = "") -> float:
    """Return how much of a resource the cluster has, or may get from its autoscaler.

    Before a local Ray is started, that is what it will have.

    Args:
        resource: `CPU` or `GPU`.
        label: value of the label `pool` of the nodes that count; empty: all nodes.
    """
    if not ray.is_initialized():
        if not os.environ.get("RAY_ADDRESS"):
            gpus = torch.cuda.device_count()
            return float({"CPU": session.LOGICAL_CPUS, "GPU": gpus}.get(resource, 0))
        session.start()
    most = float(internals.max_cluster_resources().get(resource, 0.0))
    if label and not most:
        return sum(node["Resources"].get(resource, 0.0) for node in _live_nodes(label))
    return max(ray.cluster_resources().get(resource, 0.0), most)


def free_gpus() -> float:
    """Return how many GPUs of the cluster, as large as it is now, nothing has taken."""
    session.start()
    return float(int(ray.available_resources().get("GPU", 0.0)))
