"""Who proposes the settings of trials, which are tried first, and who stops poor trials."""

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

import optuna
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.tune import search_space
from cvmatch.tune.search_space import Point, Space
from cvmatch.tune.settings import Tune

DEFAULTS = "defaults"
"""What `Tune.enqueue` calls the settings of `Tune.base`."""


def build_search(config: Tune, space: Space, points: list[Point]) -> OptunaSearch:
    """Build what proposes settings, the `points` first."""
    metric, mode = config.goal
    return OptunaSearch(
        space=functools.partial(search_space.suggest, space=space),
        metric=metric,
        mode=mode,
        points_to_evaluate=points,
        sampler=_build_sampler(config),
    )


def _build_sampler(config: Tune) -> optuna.samplers.BaseSampler:
    if config.sampler == "cmaes":
        # Else Optuna imports it within the first draw, which Ray warns is slow.
        importlib.import_module("cmaes")
        return optuna.samplers.CmaEsSampler(seed=config.seed, warn_independent_sampling=False)
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=config.seed)
    return optuna.samplers.RandomSampler(seed=config.seed)


def build_scheduler(config: Tune) -> TrialScheduler:
    """Build what stops poor trials by the metric of their epochs."""
    if config.scheduler == "asha":
        return ASHAScheduler(
            time_attr="epoch", max_t=config.epochs, grace_period=config.grace, reduction_factor=3
        )
    if config.scheduler == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=config.grace)
    return FIFOScheduler()


def list_first(config: Tune, base: Any, space: Space) -> list[Point]:
    """Return the settings that are tried before any are drawn: a grid's all, else the enqueued.

    Raises:
        ValueError: the grid has ranges, or of a source no settings are within the space.
    """
    if config.sampler == "grid":
        return search_space.list_grid(space)
    points: list[Point] = []
    for source in config.enqueue:
        known = [configs.flat(base)] if source == DEFAULTS else _read_trials(source, config)
        within = [
            point
            for values in known
            if (point := search_space.select_searched(values, space)) is not None
        ]
        if not within:
            raise ValueError(
                f"--enqueue {source}: expected settings within the space, got "
                f"{[_searched(values, space) for values in known[:1]]}, the space is "
                f"{dict(space)}. Widen --space, or leave them out."
            )
        points += [point for point in within if point not in points]
    return points[: max(1, config.trials // 2)]


def _read_trials(location: str, config: Tune) -> list[Point]:
    """Read the settings of an earlier search, the best by this one's metric first."""
    metric, mode = config.goal
    sign = 1 if mode == "min" else -1

    def order(trial: Mapping[str, Any]) -> tuple[bool, float]:
        value = trial["metrics"].get(metric, math.nan)
        return not math.isfinite(value), sign * value if math.isfinite(value) else 0.0

    trials = [trial for trial in storage.read_json(location) if trial["params"]]
    return [trial["params"] for trial in sorted(trials, key=order)]


def _searched(values: Mapping[str, Any], space: Space) -> Point:
    return {field: values.get(field) for field in space}
