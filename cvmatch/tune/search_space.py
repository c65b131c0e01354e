"""Which settings of a stage a search varies, and in which ranges."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.training.checkpoints import TrainResult
from cvmatch.tune.settings import Stage

STAGES = {
    "generator": ("cvmatch.generate.settings:TrainGenerator", "cvmatch.generate.train"),
    "segmenter": ("cvmatch.segment.settings:TrainSegmenter", "cvmatch.segment.train"),
    "matcher": ("cvmatch.match.settings:TrainMatcher", "cvmatch.match.train"),
}
"""Where the settings of each stage are, and its train() and measure()."""

Point = dict[str, object]
"""Settings of a trial that were searched, by field."""

Space = Mapping[str, Mapping[str, Any]]
"""Dotted field -> {uniform or loguniform: [low, high]} or {choice: [...]}; and beside it, where the
field matters only with some choices of fields that stand before it, {when: {field: [choice]}}."""

SPACES: dict[str, Space] = {
    "generator": {
        "noise_weight": {"loguniform": [0.3, 3.0]},
        "clip_weight": {"loguniform": [0.03, 3.0]},
        "lpips_weight": {"loguniform": [0.03, 3.0]},
    },
    "segmenter": {
        "lr": {"loguniform": [1e-5, 3e-4]},
        "lr_head": {"loguniform": [1e-4, 3e-3]},
        "class_weights": {"choice": [False, True]},
        "dice_weight": {"choice": [0.0, 0.5, 1.0]},
    },
    "matcher": {
        "loss": {"choice": ["triplet", "infonce"]},
        "margin": {"uniform": [0.05, 0.6], "when": {"loss": ["triplet"]}},
        "lr_towers": {"loguniform": [1e-5, 1e-3]},
        "lr_heads": {"loguniform": [1e-4, 1e-2]},
    },
}
"""Searched by default."""

KINDS = ("uniform", "loguniform", "choice")
"""How a field may be drawn."""

_WHEN = "when"


def load_space(stage: Stage, location: str = "") -> Space:
    """Return what the search varies: of a YAML file in the form of SPACES, else the default."""
    if not location:
        return SPACES[stage]
    space = yaml.safe_load(storage.read_text(location))
    return {
        field: {
            kind: [_number(value) for value in values] if kind in KINDS[:2] else values
            for kind, values in distribution.items()
        }
        if isinstance(distribution, Mapping)
        else distribution
        for field, distribution in space.items()
    }


def _number(value: Any) -> Any:
    """Read 1e-4, which is text in YAML 1.1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_space(base: Any, space: Mapping[str, Any]) -> None:
    """Check that the searched fields are the stage's, and take both ends of their ranges.

    Raises:
        ValueError: not so; names the field.
    """
    before: dict[str, Any] = {}
    for field, distribution in (space or {}).items():
        kinds = set(distribution) - {_WHEN} if isinstance(distribution, Mapping) else set()
        if len(kinds) != 1 or not kinds <= set(KINDS):
            raise ValueError(
                f"space: {field}: expected one of {sorted(KINDS)} with its values, such "
                f"as {{uniform: [0.1, 0.5]}}, got {distribution!r}."
            )
        _check_condition(field, distribution.get(_WHEN, {}), before)
        before[field] = distribution
        kind, values = draw_of(distribution)
        if kind != "choice" and not (len(values) == 2 and values[0] < values[1]):
            raise ValueError(f"space: {field}: expected [low, high], got {values!r}.")
        for value in values:
            configs.override(base, {field: value})
    if not space:
        raise ValueError("space: expected at least one field, got none.")


def _check_condition(field: str, condition: Any, before: Space) -> None:
    """Check that a field depends on choices of fields that were drawn before it."""
    for name, allowed in _allowed(condition).items():
        choices = before.get(name, {}).get("choice", [])
        if not allowed or any(value not in choices for value in allowed):
            raise ValueError(
                f"space: {field}: expected {_WHEN} to name choices of a field above it, such as "
                f"{{loss: [triplet]}}, got {condition!r}; above it there are {list(before)}."
            )


def draw_of(distribution: Mapping[str, Any]) -> tuple[str, list]:
    """Return how a field is drawn, of KINDS, and its range or choices."""
    ((kind, values),) = ((kind, values) for kind, values in distribution.items() if kind in KINDS)
    return kind, values


def is_active(distribution: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return whether a field matters beside the values of those before it."""
    condition = _allowed(distribution.get(_WHEN, {}))
    return all(values.get(name) in allowed for name, allowed in condition.items())


def suggest(trial: Any, space: Space) -> None:
    """Draw the fields of a trial (an `optuna.Trial`), in order, but for those that do not matter.

    Optuna's define-by-run form; Ray's OptunaSearch collects what is drawn.
    """
    values: Point = {}
    for field, distribution in space.items():
        if is_active(distribution, values):
            kind, draws = draw_of(distribution)
            if kind == "choice":
                values[field] = trial.suggest_categorical(field, draws)
            else:
                values[field] = trial.suggest_float(field, *draws, log=kind == "loguniform")


def list_grid(space: Space) -> list[Point]:
    """Return all combinations of the choices, each once.

    Raises:
        ValueError: a field has a range.
    """
    points: list[Point] = [{}]
    for field, distribution in space.items():
        kind, choices = draw_of(distribution)
        if kind != "choice":
            raise ValueError(
                f"space: {field}: a grid takes choices, got {kind} of {choices}. Name values in a "
                "file for --space, such as {choice: [0.1, 0.2]}, or pass another --sampler."
            )
        points = [
            {**point, **({field: choice} if active else {})}
            for point in points
            for active in [is_active(distribution, point)]
            for choice in (choices if active else [None])
        ]
    return points


def select_searched(values: Mapping[str, Any], space: Space) -> Point | None:
    """Return the searched ones of some settings; None where the space does not hold them."""
    point: Point = {}
    for field, distribution in space.items():
        if not is_active(distribution, point):
            continue
        if field not in values or not _holds(distribution, values[field]):
            return None
        point[field] = values[field]
    return point


def _holds(distribution: Mapping[str, Any], value: Any) -> bool:
    kind, draws = draw_of(distribution)
    if kind == "choice":
        return value in draws
    return isinstance(value, int | float) and draws[0] <= value <= draws[1]


def _allowed(condition: Mapping[str, Any]) -> dict[str, list]:
    """Return the choices of each field that a condition allows; one may stand without brackets."""
    return {
        name: allowed if isinstance(allowed, list) else [allowed]
        for name, allowed in condition.items()
    }


def load_settings(stage: Stage, location: str = "") -> Any:
    """Return the stage's settings: its defaults, or those of a YAML file."""
    words = ["--config", location] if location else []
    return configs.parse(_load(STAGES[stage][0]), words)


def load_train(stage: Stage) -> Callable[[Any], TrainResult]:
    """Import the train() of a stage."""
    return _load(f"{STAGES[stage][1]}:train")


def load_measure(stage: Stage) -> Callable[[Any, str], dict[str, float]]:
    """Import the measure() of a stage."""
    return _load(f"{STAGES[stage][1]}:measure")


def _load(location: str) -> Any:
    # By name, since a search of one stage should not wait for the libraries of the others (10 s).
    module, name = location.split(":")
    return getattr(importlib.import_module(module), name)
