"""How much each searched setting mattered: PED-ANOVA of the trials, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna

from cvmatch.report.page import Importance
from cvmatch.tune.search_space import Space, draw_of

LEAST = 6
"""Trials below which nothing is said of importance."""

_RESAMPLES = 40


def measure(
    trials: Sequence[tuple[Mapping[str, Any], float]], space: Space, maximise: bool
) -> list[Importance]:
    """Measure the importance of settings, with the 90 % interval of a bootstrap over the trials.

    Watanabe et al. 2023 (PED-ANOVA): how far the best tenth's settings are from all others'.

    Args:
        trials: settings within the space, and the finite value that came out.
        space: what was searched.
        maximise: whether large values are good.

    Returns:
        The most important first; nothing where there are fewer than LEAST trials.
    """
    if len(trials) < LEAST:
        return []
    random = np.random.default_rng(0)
    whole = _shares(trials, space, maximise)
    drawn = [
        _shares([trials[index] for index in rows], space, maximise)
        for rows in random.integers(len(trials), size=(_RESAMPLES, len(trials)))
    ]
    found = []
    for name in sorted(whole, key=lambda name: -whole[name]):
        low, high = np.quantile([shares.get(name, 0.0) for shares in drawn], [0.05, 0.95])
        found.append(Importance(name=name, share=whole[name], low=float(low), high=float(high)))
    return found


def _shares(
    trials: Sequence[tuple[Mapping[str, Any], float]], space: Space, maximise: bool
) -> dict[str, float]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it tells of every study
    try:
        study = optuna.create_study(direction="maximize" if maximise else "minimize")
        for params, value in trials:
            within = {name: params[name] for name in space if name in params}
            distributions = {name: _distribution(space[name]) for name in within}
            study.add_trial(
                optuna.trial.create_trial(params=within, distributions=distributions, value=value)
            )
        return optuna.importance.get_param_importances(study)
    finally:
        optuna.logging.set_verbosity(level)


def _distribution(drawn: Mapping[str, Any]) -> optuna.distributions.BaseDistribution:
    kind, values = draw_of(drawn)
    if kind == "choice":
        return optuna.distributions.CategoricalDistribution(values)
    return optuna.distributions.FloatDistribution(*values, log=kind == "loguniform")
