"""The page of a search: its trials, what mattered, what it cost, and how to train the best."""

import math
from collections.abc import Sequence

from cvmatch.data import storage
from cvmatch.report.page import Page, Trial, describe_run, write_page
from cvmatch.tune import importance
from cvmatch.tune.search_space import Space
from cvmatch.tune.settings import Tune
from cvmatch.tune.trials import TrialSummary

PAGE = "tune.html"
"""File of a search's output."""

_LIMITS = (
    "A trial that was stopped early counts with its last epoch, so it may look poorer than it "
    "would have become.",
    "One seed each: differences smaller than those between seeds say nothing.",
)


def write_tune_page(config: Tune, space: Space, trials: Sequence[TrialSummary], best: str) -> str:
    """Write the page of a search to its output; returns its location.

    Args:
        config: What was searched, and for how long.
        space: The fields that were drawn.
        trials: All trials.
        best: Settings of the best, as YAML.
    """
    metric, mode = config.goal
    known = [
        (trial["params"] or {}, float(trial["metrics"][metric]))
        for trial in trials
        if math.isfinite(trial["metrics"].get(metric, math.nan))
    ]
    page = Page(
        title=f"cvmatch: settings of the {config.stage}",
        summary=f"{len(trials)} trials by {config.sampler}, compared by {metric} "
        f"({'the largest' if mode == 'max' else 'the least'} is the best).",
        run=describe_run(),
        config=best,
        trials=[_describe(trial, metric) for trial in trials],
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
        value=trial["metrics"].get(metric, math.nan),
        state=trial["state"],
        history=[(epoch, value) for epoch, value in trial["history"]],
    )


def _describe_cost(trials: Sequence[TrialSummary]) -> dict[str, str]:
    """Return epochs and hours of the trials, and what early stopping left out."""
    epochs = [int(trial["metrics"].get("epoch", 0)) for trial in trials]
    whole = max(epochs, default=0) * len(trials)
    states = [trial["state"] for trial in trials]
    return {
        "Trials": ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        "Epochs": f"{sum(epochs)} of the {whole} that all trials in full would be",
        "Hours of trials": f"{sum(trial['seconds'] for trial in trials) / 3600:.2f}",
    }
