"""Search a stage's settings: trials of its train(), proposed by Optuna, poor ones stopped early.

A trial is one call of the stage's own train(), with some fields replaced by name (`fit.seed`,
`margin`). The search is its name and storage: the same command again goes on where it was killed.
"""

import dataclasses
import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.tune import Tuner

from cvmatch import config as configs
from cvmatch.data import manifest, storage
from cvmatch.data.settings import Validation
from cvmatch.nn import metrics
from cvmatch.runtime import pools, progress, session, tracking
from cvmatch.training.settings import TrainConfig
from cvmatch.tune import execution, proposals, repeats, search_space
from cvmatch.tune.execution import EndedTrials, Search, StageCode
from cvmatch.tune.page import write_tune_page
from cvmatch.tune.repeats import RepeatedTrial
from cvmatch.tune.settings import Tune
from cvmatch.tune.trials import TrialSummary, find_front, order_trials, value_of

BEST, TRIALS, SEARCH = "best.yaml", "trials.json", "search.json"
REPEATS, FRONT = "repeats.json", "front"

_RUN_STATES = {
    "finished": ("FINISHED", ""),
    "stopped early": ("KILLED", "stopped early"),
    "failed": ("FAILED", ""),
}
"""MLflow's status of a trial's run, and a tag that says why."""


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What a search found."""

    params: Mapping[str, Any]
    """Dotted field -> value of the best trial."""
    metric: str
    """By what trials were compared."""
    maximise: bool
    """Whether large values of it are good."""
    value: float
    """Metric of the best trial, after its last epoch; where trials were repeated, its mean."""
    trials: list[TrialSummary]
    """All trials."""
    front: list[TrialSummary] = field(default_factory=list)
    """Of several metrics, the trials that no other beats in all."""
    repeated: list[RepeatedTrial] = field(default_factory=list)
    """Candidates that were trained with several seeds, the best one first."""


def search(config: Tune, base: Any = None, code: StageCode | None = None) -> TuneResult:
    """Try settings, write `best.yaml`, `trials.json` and the page `tune.html` to `config.output`.

    Args:
        config: What is searched, and for how long.
        base: The stage's settings, in place of the file `config.base`.
        code: Trains and measures with such settings, in place of the stage's own.

    Raises:
        ValueError: a searched field is none of the stage's or its range is refused, the metric
            will not be there after every epoch, the cluster is too small, or the name is that of
            another search.
        RuntimeError: no trial reported a finite metric.
        KeyboardInterrupt: Ctrl-C; Tune kept the search, and the same name goes on with it.
    """
    base = base or search_space.load_settings(config.stage, config.base)
    space = search_space.load_space(config.stage, config.space)
    search_space.check_space(base, space)
    first = proposals.list_first(config, base, space)
    if config.sampler == "grid":
        config = dataclasses.replace(config, trials=len(first))
    _check_measured(config, base)
    _check_repeats(config, base, space)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints banners when silent, too
    _preflight(config, base.fit)
    session.start(dashboard=base.fit.workers > 0)
    if base.fit.workers and not session.has_dashboard():
        raise ValueError(
            "tune: trials with workers need Ray's dashboard: without it, Ray 2.60 never frees the "
            "CPUs of a trial that was stopped early. Use session.start(dashboard=True), or "
            "--fit.workers 0 in the stage's settings."
        )
    name = config.name or f"tune-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    location = storage.join(storage.absolute(config.storage), name)
    _claim(location, config, base, space)
    base = configs.override(base, {"fit.epochs": config.epochs})
    with tracking.start("tune", config) as parent:
        shared = Search(
            name=name,
            code=code,
            stage=config.stage,
            base=base,
            val=configs.merge(base, config.test).val if config.test else None,
            fits=f"{location}-fits",
            parent=parent,
            directory=os.getcwd(),
        )
        tuner = execution.build_tuner(config, space, first, shared, location)
        trials = _run(tuner, config, shared, config.trials, f"trials of {config.stage}")
        result = _choose_best(trials, config)
        if config.repeats:
            result = _repeat(config, shared, result, space, location)
        best = _write(result, config, base)
        write_tune_page(config, space, result.trials, best, result.repeated, result.front)
        parent.metrics({f"best/{config.goal[0]}": result.value})
        parent.text(best, BEST)
    return result


def _run(tuner: Tuner, config: Tune, search: Search, count: int, what: str) -> list[TrialSummary]:
    """Run `count` trials, and give their MLflow runs the state that they ended with."""
    EndedTrials.count = 0
    with progress.watch(f"{count} {what} ended", count, lambda: EndedTrials.count):
        grid = tuner.fit()
    trials = execution.describe_trials(grid, config.goal[0], config.epochs)
    tracking.end_runs(
        {search.run_name(trial["trial"]): _RUN_STATES[trial["state"]] for trial in trials}
    )
    if EndedTrials.count < count:
        raise KeyboardInterrupt  # Tune takes Ctrl-C, saves its state, and returns
    return trials


def _repeat(
    config: Tune, search: Search, result: TuneResult, space: Mapping, location: str
) -> TuneResult:
    """Train the best trials and the defaults with other seeds; choose the best by the mean."""
    defaults = search_space.select_searched(configs.flat(search.base), space)
    candidates = repeats.list_candidates(config, result.trials, defaults)
    points = repeats.list_points(config, candidates, search.base.fit.seed)
    # Named by what is repeated, since more repeats of a search may be asked for later.
    place = f"{location}-repeats-{manifest.digest([points, config.test])[:8]}"
    tuner = execution.build_repeats(config, points, search, place)
    trainings = _run(tuner, config, search, len(points), "repeated trainings")
    repeated = repeats.collect(config, candidates, trainings)
    best = repeated[0]
    value = metrics.mean_interval(best["values"]).value
    if not math.isfinite(value):
        errors = [one["error"] for one in trainings if one["error"]]
        raise RuntimeError(
            f"tune: no candidate reported a finite {config.goal[0]!r} with each of "
            f"{config.repeats} seeds; {errors[:1]}. The same command goes on."
        )
    return dataclasses.replace(result, params=best["params"], value=value, repeated=repeated)


def _check_repeats(config: Tune, base: Any, space: Mapping) -> None:
    """Check that seeds are free for the repeats, and that no trial sees the rows of `test`.

    Raises:
        ValueError: not so.
    """
    if config.repeats and repeats.SEED in space:
        raise ValueError(
            f"tune: {repeats.SEED} is searched, and repeats take other seeds. Leave it out of "
            "--space, or pass --repeats 0."
        )
    if not config.test:
        return
    unseen = _name_rows(configs.merge(base, config.test).val)
    if unseen in (None, _name_rows(base.val)):
        raise ValueError(
            f"tune: expected --test {config.test} to name rows by `val`, and others than the "
            f"search is judged by, got {base.val}."
        )
    if not config.goal[0].startswith("val/"):
        raise ValueError(
            f"tune: --test measures val/... on other rows: expected such a --metric first, got "
            f"{config.goal[0]!r}."
        )


def _name_rows(val: Any) -> object:
    """Return what rows a stage's `val` names: a location, or a split of a data set."""
    if isinstance(val, Validation):
        return storage.absolute(val.root).rstrip("/"), val.split
    return storage.absolute(val).rstrip("/") if val and isinstance(val, str) else val or None


def _check_measured(config: Tune, base: Any) -> None:
    """Check that the stage measures the metrics by which trials are compared.

    Raises:
        ValueError: it does not.
    """
    for metric, _ in config.goals:
        if metric.startswith("val/") and not getattr(base, "held_out", base.val):
            raise ValueError(
                f"tune: metric {metric!r} is of validation rows: set --val of the stage."
            )
        of_samples = config.stage == "generator" and not metric.startswith(("val/loss", "val/gap"))
        if metric.startswith("val/") and of_samples and not base.validation_images:
            raise ValueError(
                f"tune: metric {metric!r} is of sampled pictures, got validation_images 0. Set it "
                "in the stage's settings, or pass --metric val/loss (which the image losses only "
                "worsen)."
            )


def _preflight(config: Tune, fit: TrainConfig) -> None:
    shares = config.concurrent * max(fit.workers, 1)
    pools.require_resources(
        shares * fit.cpus_per_worker + pools.READERS,
        shares * fit.gpus_per_worker,
        f"{config.concurrent} trials at a time and {pools.READERS:g} CPU to read",
        "fit.cpus_per_worker of --base",
        "fit.gpus_per_worker of --base",
    )


def _claim(location: str, config: Tune, base: Any, space: Mapping) -> None:
    free = ("concurrent", "storage", "name", "output", "base", "space")
    free += ("repeats", "finalists", "test")  # which come after the search
    about = {k: v for k, v in configs.flat(config).items() if k not in free}
    about |= {"base": configs.plain(base), "searched": dict(space)}
    file = storage.join(f"{location}-fits", SEARCH)
    if storage.exists(file):
        before = storage.read_json(file)
        changed = sorted(name for name in about if before.get(name) != about[name])
        if changed:
            raise ValueError(
                f"{location} holds a search with other settings ({changed}), which cannot go on. "
                "Choose another --name, or delete it."
            )
    storage.write_json(file, about)


def _choose_best(trials: list[TrialSummary], config: Tune) -> TuneResult:
    metric, mode = config.goal
    front = find_front(trials, config.goals) if len(config.goals) > 1 else []
    best = (front or order_trials(trials, config.goal))[0]
    params, value = best["params"], value_of(best, metric)
    if not math.isfinite(value):
        raise RuntimeError(
            f"tune: no trial reported a finite {metric!r}; the first said: "
            f"{trials[0]['error'] or sorted(trials[0]['metrics'])}"
        )
    assert params is not None, "a trial that reported has begun"
    return TuneResult(
        params=params,
        metric=metric,
        maximise=mode == "max",
        value=value,
        trials=trials,
        front=front,
    )


def _write(result: TuneResult, config: Tune, base: Any) -> str:
    """Write the files of the output but for the page; returns the best settings as YAML."""
    best = _dump_settings(base, result.params)
    storage.write_text(storage.join(config.output, BEST), best)
    trials = storage.replace_non_finite(result.trials)
    storage.write_json(storage.join(config.output, TRIALS), trials)
    for old in (REPEATS, FRONT):
        storage.remove(storage.join(config.output, old))
    if result.repeated:
        repeated = storage.replace_non_finite(result.repeated)
        storage.write_json(storage.join(config.output, REPEATS), repeated)
    for place, trial in enumerate(result.front):
        file = storage.join(config.output, FRONT, f"{place + 1:02}.yaml")
        storage.write_text(file, _dump_settings(base, trial["params"] or {}))
    return best


def _dump_settings(base: Any, params: Mapping[str, Any]) -> str:
    """Return all settings as YAML: the file alone trains the trial again, as a run of its own."""
    changes = {**params, **execution.only_process(base), "fit.name": ""}
    return configs.dump(configs.override(base, changes))
