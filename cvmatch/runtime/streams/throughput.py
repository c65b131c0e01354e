"""What the stages of a running stream have done: rows a second each, and which one is slowest."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ray.data import Dataset

from cvmatch.runtime import internals

StepCallback = Callable[[Any], None]
"""Called with Ray Data's executor of a running stream, in its thread."""

_step_callbacks: ContextVar[tuple[StepCallback, ...]] = ContextVar("cvmatch_steps", default=())


@contextlib.contextmanager
def call_each_step(rows: Dataset, *callbacks: StepCallback) -> Iterator[None]:
    """Call `callbacks` again and again while the block computes `rows`, or what is made of them.

    One that raises ends the stream with its exception.
    """
    classes = internals.callback_classes(rows.context)
    if classes is not None:
        internals.set_callback_classes(rows.context, [*classes, _StepCallbacks])
    token = _step_callbacks.set(callbacks)
    try:
        yield
    finally:
        _step_callbacks.reset(token)
        internals.set_callback_classes(rows.context, classes)


class _StepCallbacks(internals.ExecutionCallback):
    """Ray makes it, without arguments, when it plans; it also sends the class to its workers."""

    def __init__(self) -> None:
        self.callbacks = _step_callbacks.get()

    def on_execution_step(self, executor: Any) -> None:
        for callback in self.callbacks:
            callback(executor)


@dataclass
class StageCounts:
    """Counts of one operator of a stream."""

    rows: float = 0.0
    """Rows of its finished tasks."""
    busy: float = 0.0
    """Seconds of these tasks, of all together."""
    queued: int = 0
    """Blocks that wait for it."""
    tasks: int = 1
    """Tasks at a time, at most so far; 1 of a stage that has no actors, but takes any free CPU."""

    @property
    def rate(self) -> float:
        """Rows a second that it makes while it has work; 0: nothing is finished yet."""
        return self.rows * self.tasks / self.busy if self.busy else 0.0


class StageThroughput:
    """The stages of a stream while it runs; other threads may read it.

    `operators`: name of a stage -> what the name of Ray's operator contains.
    """

    def __init__(self, operators: Mapping[str, str]) -> None:
        self.operators = dict(operators)
        self.stages = {name: StageCounts() for name in operators}

    def update(self, executor: Any) -> None:
        """Take over the executor's counts (a `StepCallback`)."""
        for counts in internals.operator_counts(executor):
            for name, operator in self.operators.items():
                if operator in counts.name:
                    stage = self.stages[name]
                    stage.rows, stage.busy = counts.rows, counts.busy_s
                    stage.queued = counts.queued
                    stage.tasks = max(stage.tasks, counts.slots)

    @property
    def slowest(self) -> str:
        """The stage with the lowest rate, which the others wait for; empty: not known yet."""
        rates = {name: stage.rate for name, stage in self.stages.items() if stage.rate}
        return min(rates, key=rates.__getitem__) if len(rates) == len(self.stages) else ""

    def summary(self) -> str:
        """Return `read 500/s  generate 16/s (slowest)  segment 120/s  write 1.2e+03/s`."""
        return "  ".join(
            f"{name} {stage.rate:.3g}/s" + (" (slowest)" if name == self.slowest else "")
            for name, stage in self.stages.items()
            if stage.rate
        )
