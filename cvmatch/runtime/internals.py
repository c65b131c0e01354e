"""Every private API of other libraries that cvmatch reaches into, and nothing else.

Each entry names the version it was seen in. Where a new version lacks it, cvmatch does without and
logs one warning; tests/runtime/test_internals.py says which entry a new version breaks.
"""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

RAY = "2.60.0"
TORCHMETRICS = "1.9.0"
"""Versions in which the entries below were seen."""

_SHORT_PAUSE_S, _PAUSE_S = 0.005, 0.05  # at first and at most, of `SchedulerThrottle`

_log = logging.getLogger(__name__)


@functools.cache
def _warn(name: str, seen: str, consequence: str) -> None:
    """Say once what a library lacks, and what follows from it."""
    _log.warning("%s, seen in %s, is not in the version installed: %s.", name, seen, consequence)


# Ray: flags of its C++ processes, read when they start.


def set_ray_flags(logical_cpus: int) -> None:
    """Set flags of a local Ray that have no public form; one that Ray does not know is ignored.

    Workers that idle live 30 s: Ray ends them after one, and starting one takes 2 to 10 s of a
    core.
    """
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "30000")
    os.environ.setdefault("RAY_num_workers_soft_limit", str(2 * logical_cpus))


# Ray: an error that its core writes to the terminal once in a process, when an actor that may be
# restarted gets an object as an argument. Ray Data starts all its actors so (ray issue 53727).


def spend_restart_warning() -> None:
    """Have Ray write that error now, while nobody listens; for a local Ray.

    The actor asks for what no node has, so it is never started. A version that does not write the
    error does nothing here.
    """
    import ray

    # Made by hand: one a call, since Ray changes a class that it makes an actor of, and one that no
    # checker of types has wrapped, since Ray then cannot pickle it.
    unstarted = type("Unstarted", (), {"__init__": lambda self, argument: None})
    options = {"num_cpus": 0, "max_restarts": -1, "resources": {"no_such_resource": 1}}
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        actor: Any = ray.remote(unstarted).options(**options).remote(ray.put(None))
        ray.kill(actor)
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


# Ray: what the cluster may grow to.


def max_cluster_resources() -> Mapping[str, float]:
    """Return the resources that the autoscaler may add up to; nothing where there is none."""
    try:
        from ray._private.state import state

        return state.get_max_resources_from_cluster_config() or {}
    except (ImportError, AttributeError):
        _warn("state.get_max_resources_from_cluster_config", RAY, "only nodes that run are counted")
        return {}


# Ray Data: callbacks in the loop that runs a stream. The executor calls the methods of whatever
# class is listed, so none of Ray's classes is needed as a base.


class ExecutionCallback:
    """A callback of Ray Data's executor whose methods do nothing, known to this version or not."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_args, **_options: None


class SchedulerThrottle(ExecutionCallback):
    """Pause in each turn of Ray Data's scheduling loop, the longer while rows wait for a consumer.

    Without it the loop spins then, in a thread of the process that consumes
    (docs/decisions.md#scheduler-throttle).
    """

    def __init__(self) -> None:
        self.pause = _SHORT_PAUSE_S

    def on_execution_step(self, executor: Any) -> None:
        """Sleep."""
        try:
            idle = executor._consumer_idling()
        except AttributeError:
            _warn("StreamingExecutor._consumer_idling", RAY, "Ray Data's loop may use a core")
            idle = True
        self.pause = _SHORT_PAUSE_S if idle else min(2 * self.pause, _PAUSE_S)
        time.sleep(self.pause)


def callback_classes(context: Any) -> list[type] | None:
    """Return a copy of the callbacks of a `DataContext`; None where it has none."""
    classes = getattr(context, "custom_execution_callback_classes", None)
    if classes is None:
        consequence = "streams show no rates, and end only at their end when too many rows fail"
        _warn("DataContext.custom_execution_callback_classes", RAY, consequence)
    return None if classes is None else list(classes)


def set_callback_classes(context: Any, classes: list[type] | None) -> None:
    """Set the callbacks of a `DataContext`; None changes nothing."""
    if classes is not None:
        context.custom_execution_callback_classes = classes


# Ray Data: counts of a running operator.


@dataclass(frozen=True)
class OperatorCounts:
    """What one operator of a stream has done."""

    name: str
    """Ray's name of it, which contains that of the function or class."""
    rows: float
    """Rows of its finished tasks, as far as Ray counts them: of their inputs."""
    busy_s: float
    """Seconds of these tasks, all together."""
    slots: int
    """Tasks that its actors run at a time; 0 where it has no actors."""
    queued: int
    """Blocks that wait for it."""


def operator_counts(executor: Any) -> list[OperatorCounts]:
    """Return the counts of each operator of a running `StreamingExecutor`."""
    try:
        return [_counts(*one) for one in (executor._topology or {}).items()]
    except AttributeError as error:
        _warn(f"counts of operators ({error})", RAY, "streams show no rates")
        return []


def _counts(operator: Any, state: Any) -> OperatorCounts:
    metrics, pools = operator.metrics, operator.get_autoscaling_actor_pools()
    started = metrics.num_tasks_submitted
    rows = metrics.rows_inputs_of_submitted_tasks  # of the inputs: a write returns a row a task
    return OperatorCounts(
        name=operator.name,
        rows=float(rows * metrics.num_tasks_finished / started) if started else 0.0,
        busy_s=float(metrics.block_generation_time + metrics.block_serialization_time_s),
        slots=sum(pool.num_alive_actors() * pool.max_actor_concurrency() for pool in pools),
        queued=int(state.total_enqueued_input_blocks()),
    )


# Ray Train: what it does on its workers before it joins them to a process group.


def torch_backend() -> type | None:
    """Return what Ray Train runs on its workers; None where this version has it elsewhere."""
    try:
        from ray.train.torch.config import _TorchBackend
    except ImportError:
        _warn("ray.train.torch.config._TorchBackend", RAY, "Gloo may listen on 127.0.0.1")
        return None
    return _TorchBackend


# torchmetrics: the linear weights of LPIPS, which its wheel holds.


def lpips_weights_file() -> str:
    """Return the path of torchmetrics' linear weights of LPIPS for VGG16.

    Raises:
        FileNotFoundError: this version of torchmetrics has them elsewhere.
    """
    import torchmetrics

    path = os.path.join(
        os.path.dirname(torchmetrics.__file__), "functional", "image", "lpips_models", "vgg.pth"
    )
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: expected the weights of LPIPS, as in torchmetrics {TORCHMETRICS}, found none "
            f"in {metadata.version('torchmetrics')}. Install torchmetrics=={TORCHMETRICS}."
        )
    return path
