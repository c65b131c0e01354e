"""The trials of a search, as in trials.json, and their order."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

SECONDS = "seconds"
"""Metric: what a trial took, from its first step to its last."""

Goal = tuple[str, Literal["min", "max"]]
"""A metric, and whether small or large values of it are good."""

TrialState = Literal["finished", "stopped early", "failed"]


class TrialSummary(TypedDict):
    """A trial of a search, as in trials.json."""

    trial: str
    """Its id."""
    params: Mapping[str, Any] | None
    """Dotted field -> value; None where it failed before it began."""
    metrics: Mapping[str, int | float]
    """Of its last epoch."""
    error: str
    """Why it failed, else empty."""
    state: TrialState
    history: list[list[int | float]]
    """[epoch, the first of the compared metrics] after each of its epochs."""
    seconds: float | None
    """That it ran; NaN (in JSON: null) where it was killed and went on."""


def value_of(trial: TrialSummary, metric: str) -> float:
    """Return a metric of a trial; NaN where it has none."""
    value = {SECONDS: trial.get(SECONDS), **trial["metrics"]}.get(metric)
    return math.nan if value is None else float(value)  # as JSON has it


def order_trials(trials: Sequence[TrialSummary], goal: Goal) -> list[TrialSummary]:
    """Return the trials, the best one first, and those without a finite value last."""
    metric, mode = goal
    sign = 1 if mode == "min" else -1

    def order(trial: TrialSummary) -> tuple[bool, float]:
        value = value_of(trial, metric)
        return not math.isfinite(value), sign * value if math.isfinite(value) else 0.0

    return sorted(trials, key=order)


def find_front(trials: Sequence[TrialSummary], goals: Sequence[Goal]) -> list[TrialSummary]:
    """Return the finished trials that no other is better than in all goals (the Pareto front).

    The best one by the first goal comes first.
    """
    known = {
        trial["trial"]: losses
        for trial in trials
        if trial["state"] == "finished"
        if all(map(math.isfinite, losses := _losses(trial, goals)))
    }
    front = [
        trial
        for trial in trials
        if trial["trial"] in known
        and not any(_dominates(other, known[trial["trial"]]) for other in known.values())
    ]
    return order_trials(front, goals[0])


def _losses(trial: TrialSummary, goals: Sequence[Goal]) -> list[float]:
    """Return the values of all goals, turned so that small ones are good."""
    return [(1 if mode == "min" else -1) * value_of(trial, metric) for metric, mode in goals]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether losses are nowhere worse than others, and somewhere better."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
