"""Who proposes the settings of trials, which are tried first, and who stops poor trials."""

import functools
import importlib
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
from cvmatch.tune.trials import SECONDS, order_trials

DEFAULTS = "defaults"
"""What `Tune.enqueue` calls the settings of `Tune.base`."""


def build_search(config: Tune, space: Space, points: list[Point]) -> OptunaSearch:
    """Build what proposes settings, the `points` first."""
    metrics = [tune_name(metric) for metric, _ in config.goals]
    modes = [mode for _, mode in config.goals]
    several = len(modes) > 1
    return OptunaSearch(
        space=functools.partial(search_space.suggest, space=space),
        metric=metrics if several else metrics[0],
        mode=modes if several else modes[0],
        points_to_evaluate=points,
        sampler=_build_sampler(config),
    )


def tune_name(metric: str) -> str:
    """Return what Ray Tune calls a metric."""
    return "time_total_s" if metric == SECONDS else metric


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
    trials = order_trials(storage.read_json(location), config.goal)
    return [dict(trial["params"]) for trial in trials if trial["params"]]


def _searched(values: Mapping[str, Any], space: Space) -> Point:
    return {field: values.get(field) for field in space}
