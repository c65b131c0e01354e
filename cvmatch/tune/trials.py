"""The trials of a search, as in trials.json."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

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
    """[epoch, the compared metric] after each of its epochs."""
    seconds: float
    """That it ran."""
