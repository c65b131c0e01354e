"""Which settings of a stage a search varies, and where the stages are."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ray.tune
import yaml
from ray.train import Result

from cvmatch import config as configs
from cvmatch.data import storage

Stage = Literal["generator", "segmenter", "matcher"]

STAGES = {
    "generator": ("cvmatch.generate.settings", "TrainGenerator"),
    "segmenter": ("cvmatch.segment.settings", "TrainSegmenter"),
    "matcher": ("cvmatch.match.settings", "TrainMatcher"),
}
"""Module and class of each stage's settings; its train() lies in the module `train` beside it."""

SPACES: dict[str, dict[str, dict[str, list]]] = {
    "generator": {
        "w_noise": {"loguniform": [0.3, 3.0]},
        "w_clip": {"loguniform": [0.03, 3.0]},
        "w_vae": {"loguniform": [0.03, 3.0]},
    },
    "segmenter": {
        "lr": {"loguniform": [1e-5, 3e-4]},
        "lr_head": {"loguniform": [1e-4, 3e-3]},
        "class_weights": {"choice": [False, True]},
        "dice": {"choice": [0.0, 0.5, 1.0]},
    },
    "matcher": {
        "loss": {"choice": ["triplet", "infonce"]},
        "margin": {"uniform": [0.05, 0.6]},
        "w_joint": {"loguniform": [0.3, 3.0]},
        "w_direct": {"loguniform": [0.1, 2.0]},
        "lr_towers": {"loguniform": [1e-5, 1e-3]},
        "lr_heads": {"loguniform": [1e-4, 1e-2]},
    },
}
"""Searched by default: dotted field -> {uniform or loguniform: [low, high]} or {choice: [...]}."""

METRICS = {
    "generator": ("val/loss", "min"),
    "segmenter": ("val/miou", "max"),
    "matcher": ("val/batch_recall_at_1", "max"),
}
"""What trials are compared by, and whether small or large values are good.

None changes by itself with what is searched. A training loss would: the least margin has the least.
(The generator's val/loss is the error of the noise alone, without the weights.)
"""

_DRAWS: dict[str, Callable[..., Any]] = {
    "uniform": lambda values: ray.tune.uniform(*values),
    "loguniform": lambda values: ray.tune.loguniform(*values),
    "choice": ray.tune.choice,
}


def load(stage: Stage, location: str = "") -> dict[str, dict[str, list]]:
    """What the search varies: a YAML file in the form of SPACES, else the stage's default."""
    if not location:
        return SPACES[stage]
    return yaml.safe_load(storage.read_text(location))


def check(base: Any, space: Mapping[str, Any]) -> None:
    """Check that the searched fields are the stage's, and take both ends of their ranges.

    Raises:
        ValueError: not so; names the field.
    """
    for field, draw in (space or {}).items():
        if not isinstance(draw, Mapping) or len(draw) != 1 or not set(draw) <= set(_DRAWS):
            raise ValueError(
                f"space: {field}: expected one of {sorted(_DRAWS)} with its values, such as "
                f"{{uniform: [0.1, 0.5]}}, got {draw!r}."
            )
        ((kind, values),) = draw.items()
        if kind != "choice" and not (len(values) == 2 and values[0] < values[1]):
            raise ValueError(f"space: {field}: expected [low, high], got {values!r}.")
        for value in values:
            configs.override(base, {field: value})
    if not space:
        raise ValueError("space: expected at least one field, got none.")


def drawn(space: Mapping[str, Mapping[str, list]]) -> dict[str, Any]:
    """The space as Tune draws from it."""
    return {name: _DRAWS[kind](v) for name, draw in space.items() for kind, v in draw.items()}


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """`{"fit.seed": 1}` -> `{"fit": {"seed": 1}}`, as --config files are."""
    tree: dict[str, Any] = {}
    for path, value in params.items():
        *parents, last = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def settings(stage: Stage, location: str = "") -> Any:
    """The stage's settings: its defaults, or those of a YAML file."""
    # By name, since a search of one stage should not wait for the libraries of the others (10 s).
    module, name = STAGES[stage]
    words = ["--config", location] if location else []
    return configs.parse(getattr(importlib.import_module(module), name), words)


def train(base: Any) -> Callable[[Any], Result]:
    """Return the train() of the stage that these settings are of."""
    package = type(base).__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.train").train
