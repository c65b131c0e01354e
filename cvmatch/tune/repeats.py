"""The best trials again, with other seeds: which of them is better by more than luck."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from cvmatch.nn import metrics
from cvmatch.nn.metrics import Interval
from cvmatch.tune.execution import TEST
from cvmatch.tune.proposals import DEFAULTS
from cvmatch.tune.search_space import Point
from cvmatch.tune.settings import Tune
from cvmatch.tune.trials import TrialSummary, order_trials, value_of

SEED = "fit.seed"


class RepeatedTrial(TypedDict):
    """A trial, or the settings that all trials share, trained with several seeds (repeats.json)."""

    trial: str
    """Its id; `defaults` for the settings of `Tune.base`."""
    params: Mapping[str, Any]
    """What was searched."""
    values: list[float]
    """The first of the compared metrics, of each seed; NaN where it failed."""
    test: list[float]
    """The same of the rows of `Tune.test`; empty where there are none."""


def list_candidates(
    config: Tune, trials: Sequence[TrialSummary], defaults: Point | None = None
) -> dict[str, Point]:
    """Return the searched settings of what is repeated, by name: `defaults`, and the best trials.

    Trials that did not end are no candidates, but for want of others; of equal settings, one is.

    Args:
        config: settings of the search.
        trials: what it tried.
        defaults: values of the searched fields in `Tune.base`; None: they are outside the space.
    """
    ended = [trial for trial in trials if trial["state"] == "finished"] or trials
    best = [
        trial
        for trial in order_trials(ended, config.goal)
        if trial["params"] and math.isfinite(value_of(trial, config.goal[0]))
    ]
    found: dict[str, Point] = {DEFAULTS: {}}
    for trial in best:
        params = dict(trial["params"] or {})
        if len(found) <= config.finalists and params not in (defaults, *found.values()):
            found[trial["trial"]] = params
    return found


def list_points(config: Tune, candidates: Mapping[str, Point], seed: int) -> list[Point]:
    """Return the settings of all trainings: each candidate with the seeds that follow `seed`."""
    seeds = range(seed + 1, seed + 1 + config.repeats)
    return [{**point, SEED: one} for point in candidates.values() for one in seeds]


def collect(
    config: Tune, candidates: Mapping[str, Point], trainings: Sequence[TrialSummary]
) -> list[RepeatedTrial]:
    """Return the candidates with what came out, the best one by the mean first.

    Args:
        config: settings of the search.
        candidates: of `list_candidates`.
        trainings: one for each of `list_points`; `params` is their number there.
    """
    metric, mode = config.goal
    by_number = {(trial["params"] or {}).get("number"): trial for trial in trainings}
    found = []
    for place, (name, params) in enumerate(candidates.items()):
        own = [by_number.get(place * config.repeats + seed) for seed in range(config.repeats)]
        test = metric.replace("val/", TEST, 1)
        found.append(
            RepeatedTrial(
                trial=name,
                params=params,
                values=[value_of(one, metric) if one else math.nan for one in own],
                test=[value_of(one, test) if one else math.nan for one in own]
                if config.test
                else [],
            )
        )
    sign = 1 if mode == "min" else -1

    def order(one: RepeatedTrial) -> tuple[bool, float]:
        mean = metrics.mean_interval(one["values"]).value
        return not math.isfinite(mean), sign * mean if math.isfinite(mean) else 0.0

    return sorted(found, key=order)


def subtract_defaults(
    one: RepeatedTrial, repeated: Sequence[RepeatedTrial], of_test: bool = False
) -> Interval:
    """Return the mean difference of a candidate to the defaults, paired by seed."""
    defaults = next(each for each in repeated if each["trial"] == DEFAULTS)
    own, other = (one["test"], defaults["test"]) if of_test else (one["values"], defaults["values"])
    return metrics.mean_interval([a - b for a, b in zip(own, other, strict=True)])
