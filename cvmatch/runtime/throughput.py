"""What the stages of a running stream have done: rows a second each, and which one is slowest."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from ray.data import Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor

Step = Callable[[StreamingExecutor], None]
"""Called with the executor of a running stream, in its thread."""

_steps: ContextVar[tuple[Step, ...]] = ContextVar("cvmatch_steps", default=())


@contextlib.contextmanager
def each_step(rows: Dataset, *steps: Step) -> Iterator[None]:
    """Call `steps` again and again while the block computes `rows`, or what is made of them.

    One that raises ends the stream with its exception.
    """
    classes = rows.context.custom_execution_callback_classes
    rows.context.custom_execution_callback_classes = [*classes, _Steps]
    token = _steps.set(steps)
    try:
        yield
    finally:
        _steps.reset(token)
        rows.context.custom_execution_callback_classes = classes


class _Steps(ExecutionCallback):
    """Ray makes it, without arguments, when it plans; it also sends the class to its workers."""

    def __init__(self) -> None:
        self.steps = _steps.get()

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        for step in self.steps:
            step(executor)


@dataclass
class Stage:
    """Counts of one operator of a stream."""

    rows: float = 0.0
    """Rows of its finished tasks."""
    busy: float = 0.0
    """Seconds of these tasks, of all together."""
    tasks: int = 1
    """Tasks at a time, at most so far; 1 of a stage that has no actors, but takes any free CPU."""

    @property
    def rate(self) -> float:
        """Rows a second that it makes while it has work; 0: nothing is finished yet."""
        return self.rows * self.tasks / self.busy if self.busy else 0.0


class Flow:
    """The stages of a stream while it runs; other threads may read it.

    `operators`: name of a stage -> what the name of Ray's operator contains.
    """

    def __init__(self, operators: Mapping[str, str]) -> None:
        self.operators = dict(operators)
        self.stages = {name: Stage() for name in operators}

    def update(self, executor: StreamingExecutor) -> None:
        """Take over the executor's counts (a `Step`)."""
        for operator in executor._topology or ():
            for name, part in self.operators.items():
                if part in operator.name:
                    _count(self.stages[name], operator)

    @property
    def slowest(self) -> str:
        """The stage with the lowest rate, which the others wait for; empty: not known yet."""
        rates = {name: stage.rate for name, stage in self.stages.items() if stage.rate}
        return min(rates, key=rates.__getitem__) if len(rates) == len(self.stages) else ""

    def note(self) -> str:
        """In words: `read 500/s  generate 16/s (slowest)  segment 120/s  write 1.2e+03/s`."""
        return "  ".join(
            f"{name} {stage.rate:.3g}/s" + (" (slowest)" if name == self.slowest else "")
            for name, stage in self.stages.items()
            if stage.rate
        )


def _count(stage: Stage, operator: PhysicalOperator) -> None:
    metrics, pools = operator.metrics, operator.get_autoscaling_actor_pools()
    started = metrics.num_tasks_submitted
    # Of the inputs: a write gives one row a task.
    rows = metrics.rows_inputs_of_submitted_tasks
    stage.rows = rows * metrics.num_tasks_finished / started if started else 0.0
    stage.busy = metrics.block_generation_time + metrics.block_serialization_time_s
    now = sum(pool.num_alive_actors() * pool.max_actor_concurrency() for pool in pools)
    stage.tasks = max(stage.tasks, now)
