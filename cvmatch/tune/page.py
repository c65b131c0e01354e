"""The page of a search: its trials, what mattered, what it cost, and how to train the best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cvmatch.data import storage
from cvmatch.nn.metrics import Interval, mean_interval
from cvmatch.report.page import Page, Table, Trial, describe_run, write_page
from cvmatch.tune import importance
from cvmatch.tune.proposals import DEFAULTS
from cvmatch.tune.repeats import RepeatedTrial, subtract_defaults
from cvmatch.tune.search_space import Space
from cvmatch.tune.settings import Tune
from cvmatch.tune.trials import SECONDS, TrialSummary, value_of

PAGE = "tune.html"
"""File of a search's output."""

_LIMITS = (
    "A trial that was stopped early counts with its last epoch, so it may look poorer than it "
    "would have become.",
    "One seed a trial: differences smaller than those between seeds say nothing.",
)


def write_tune_page(
    config: Tune,
    space: Space,
    trials: Sequence[TrialSummary],
    best: str,
    repeated: Sequence[RepeatedTrial] = (),
    front: Sequence[TrialSummary] = (),
) -> str:
    """Write the page of a search to its output; returns its location.

    Args:
        config: What was searched, and for how long.
        space: The fields that were drawn.
        trials: All trials.
        best: Settings of the best, as YAML.
        repeated: Trials that were trained with several seeds, the best one first.
        front: Of several metrics, the trials that no other beats in all.
    """
    metric, mode = config.goal
    known = [
        (trial["params"] or {}, value)
        for trial in trials
        if math.isfinite(value := value_of(trial, metric))
    ]
    page = Page(
        title=f"cvmatch: settings of the {config.stage}",
        summary=f"{len(trials)} trials by {config.sampler}, compared by {metric} "
        f"({'the largest' if mode == 'max' else 'the least'} is the best).",
        run=describe_run(),
        config=best,
        trials=[_describe(trial, metric) for trial in trials],
        tables=[
            *([_tabulate_front(config, front)] if front else []),
            *([_tabulate_repeats(config, repeated)] if repeated else []),
        ],
        objective=metric,
        maximise=mode == "max",
        importance=importance.measure(known, space, mode == "max"),
        importance_note="share of the difference between the best tenth and the rest (PED-ANOVA), "
        "with the 90 % interval of a bootstrap over the trials",
        cost=_describe_cost(trials),
        command=f"cvmatch train-{config.stage} --config {storage.join(config.output, 'best.yaml')} "
        f"--output models/{config.stage}-tuned",
        limits=_LIMITS,
    )
    return write_page(page, storage.join(config.output, PAGE))


def _describe(trial: TrialSummary, metric: str) -> Trial:
    return Trial(
        params={
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in (trial["params"] or {}).items()
        },
        value=value_of(trial, metric),
        state=trial["state"],
        history=[(epoch, value) for epoch, value in trial["history"]],
    )


def _tabulate_front(config: Tune, front: Sequence[TrialSummary]) -> Table:
    metrics = [metric for metric, _ in config.goals]
    return Table(
        title="What no other trial beats",
        note="in all metrics (the Pareto front); settings of each in front/",
        head=["file", *metrics, "settings"],
        rows=[
            [
                f"{place + 1:02}.yaml",
                *(value_of(trial, metric) for metric in metrics),
                _join(trial["params"] or {}),
            ]
            for place, trial in enumerate(front)
        ],
    )


def _tabulate_repeats(config: Tune, repeated: Sequence[RepeatedTrial]) -> Table:
    tested = bool(repeated[0]["test"])
    rows: list[list[str]] = []
    for one in repeated:
        cells = [one["trial"], _interval(mean_interval(one["values"])), ""]
        cells += [_interval(mean_interval(one["test"])), ""] if tested else []
        if one["trial"] != DEFAULTS:
            cells[2] = _interval(subtract_defaults(one, repeated), signed=True)
            if tested:
                cells[4] = _interval(subtract_defaults(one, repeated, of_test=True), signed=True)
        rows.append([*cells, _join(one["params"])])
    unseen = ["on rows that the search never saw", "minus the defaults"] if tested else []
    return Table(
        title=f"The best again, with {config.repeats} other seeds",
        note="means with their 95 % intervals (Student's), the best by the first one first; "
        "differences are paired by seed",
        head=["trial", config.goal[0], "minus the defaults", *unseen, "settings"],
        rows=rows,
    )


def _interval(interval: Interval, signed: bool = False) -> str:
    mean, low, high = (f"{value:{'+' if signed else ''}.4g}" for value in interval)
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def _join(params: Mapping[str, Any]) -> str:
    numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in params.items()}
    return ", ".join(f"{name} {value}" for name, value in numbers.items()) or "as --base"


def _describe_cost(trials: Sequence[TrialSummary]) -> dict[str, str]:
    """Return epochs and hours of the trials, and what early stopping left out."""
    epochs = [int(trial["metrics"].get("epoch", 0)) for trial in trials]
    whole = max(epochs, default=0) * len(trials)
    states = [trial["state"] for trial in trials]
    seconds = [one for trial in trials if math.isfinite(one := value_of(trial, SECONDS))]
    unknown = len(trials) - len(seconds)
    return {
        "Trials": ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        "Epochs": f"{sum(epochs)} of the {whole} that all trials in full would be",
        "Hours of trials": f"{sum(seconds) / 3600:.2f}" + (f" ({unknown} went on)" * bool(unknown)),
    }
