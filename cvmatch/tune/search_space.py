"""Which settings of a stage a search varies, and in which ranges."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import ray.tune
import yaml
from ray.tune.search.sample import Domain

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.training.checkpoints import TrainResult
from cvmatch.tune.settings import Stage

STAGES = {
    "generator": ("cvmatch.generate.settings:TrainGenerator", "cvmatch.generate.train:train"),
    "segmenter": ("cvmatch.segment.settings:TrainSegmenter", "cvmatch.segment.train:train"),
    "matcher": ("cvmatch.match.settings:TrainMatcher", "cvmatch.match.train:train"),
}
"""Where the settings and the train() of each stage are."""

SPACES: dict[str, dict[str, dict[str, list]]] = {
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
        "margin": {"uniform": [0.05, 0.6]},
        "lr_towers": {"loguniform": [1e-5, 1e-3]},
        "lr_heads": {"loguniform": [1e-4, 1e-2]},
    },
}
"""Searched by default: dotted field -> {uniform or loguniform: [low, high]} or {choice: [...]}."""

_DISTRIBUTIONS: dict[str, Callable[[list], Domain]] = {
    "uniform": lambda values: ray.tune.uniform(*values),
    "loguniform": lambda values: ray.tune.loguniform(*values),
    "choice": ray.tune.choice,
}


def load_space(stage: Stage, location: str = "") -> dict[str, dict[str, list]]:
    """Return what the search varies: of a YAML file in the form of SPACES, else the default."""
    if not location:
        return SPACES[stage]
    space = yaml.safe_load(storage.read_text(location))
    return {
        field: {
            kind: values if kind == "choice" else [_number(value) for value in values]
            for kind, values in distribution.items()
        }
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
    for field, distribution in (space or {}).items():
        kinds = set(distribution) if isinstance(distribution, Mapping) else set()
        if len(kinds) != 1 or not kinds <= set(_DISTRIBUTIONS):
            raise ValueError(
                f"space: {field}: expected one of {sorted(_DISTRIBUTIONS)} with its values, such "
                f"as {{uniform: [0.1, 0.5]}}, got {distribution!r}."
            )
        ((kind, values),) = distribution.items()
        if kind != "choice" and not (len(values) == 2 and values[0] < values[1]):
            raise ValueError(f"space: {field}: expected [low, high], got {values!r}.")
        for value in values:
            configs.override(base, {field: value})
    if not space:
        raise ValueError("space: expected at least one field, got none.")


def to_tune(space: Mapping[str, Mapping[str, list]]) -> dict[str, Domain]:
    """Return the space in Ray Tune's own distributions."""
    return {
        field: _DISTRIBUTIONS[kind](values)
        for field, distribution in space.items()
        for kind, values in distribution.items()
    }


def load_settings(stage: Stage, location: str = "") -> Any:
    """Return the stage's settings: its defaults, or those of a YAML file."""
    words = ["--config", location] if location else []
    return configs.parse(_load(STAGES[stage][0]), words)


def load_train(stage: Stage) -> Callable[[Any], TrainResult]:
    """Import the train() of a stage."""
    return _load(STAGES[stage][1])


def _load(location: str) -> Any:
    # By name, since a search of one stage should not wait for the libraries of the others (10 s).
    module, name = location.split(":")
    return getattr(importlib.import_module(module), name)
