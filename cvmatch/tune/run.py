"""Search a stage's settings: trials of its train(), stopped early by ASHA, proposed by Optuna.

A trial is one call of the stage's own train(), with some fields replaced by name (`fit.seed`,
`margin`). The search is its name and storage: the same command again goes on where it was killed.
"""

import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.tune
from ray._private import worker
from ray.train import Checkpoint, Result, UserCallback
from ray.tune import ResultGrid, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.runtime import progress, session, tracking
from cvmatch.training import launch
from cvmatch.training.settings import Fit
from cvmatch.tune import search_space

BEST, TRIALS, SEARCH = "best.yaml", "trials.json", "search.json"


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search the settings of one stage's training."""

    stage: search_space.Stage = "matcher"
    """Whose training."""
    base: str = ""
    """YAML file of the settings that all trials share, for the stage's job; empty: defaults."""
    space: str = ""
    """YAML file of what is searched, a line a field: `margin: {uniform: [0.1, 0.5]}` (or
    loguniform), `fit.batch: {choice: [8, 16]}`; empty: the stage's default."""
    trials: int = 16
    """Settings tried."""
    concurrent: int = 2
    """Trials at a time; their CPUs, and one to read, must fit the cluster."""
    epochs: int = 10
    """Epochs of a trial that is never stopped."""
    grace: int = 1
    """Epochs before a trial may be stopped."""
    metric: str = ""
    """Metric of an epoch by which trials are compared; empty: the stage's (`spaces.METRICS`)."""
    mode: Literal["min", "max"] = "min"
    """Whether small or large values of `metric` are good; not read where it is empty."""
    seed: int = 0
    """Seed of the proposals. (The trials' own is `fit.seed`.)"""
    storage: str = "runs"
    """Directory or URI of searches, shared by all nodes."""
    name: str = ""
    """Name of the search: the same name and storage go on with it. Empty: a new one every time."""
    output: str = "tuned"
    """Directory of best.yaml, which the stage's job takes as --config, and of trials.json."""

    def __post_init__(self) -> None:
        if min(self.trials, self.concurrent, self.grace) < 1 or self.epochs < self.grace:
            raise ValueError(
                "tune: expected trials, concurrent and grace >= 1 and epochs >= grace, got "
                f"{self.trials}, {self.concurrent}, {self.grace} and {self.epochs}."
            )

    @property
    def goal(self) -> tuple[str, str]:
        """Metric by which trials are compared, and `min` or `max`."""
        return (self.metric, self.mode) if self.metric else search_space.METRICS[self.stage]


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What a search found."""

    params: dict[str, Any]
    """Dotted field -> value of the best trial."""
    metric: str
    """By what trials were compared."""
    maximise: bool
    """Whether large values of it are good."""
    value: float
    """Metric of the best trial, after its last epoch."""
    trials: list[dict[str, Any]]
    """All trials: `trial`, `params`, `metrics` of the last epoch, `error`."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all trials are told."""

    base: Any
    fits: str
    parent: tracking.Run
    directory: str


class Report(UserCallback):
    """Tells Tune of each epoch of a fit in the trial's own process."""

    def __init__(self) -> None:
        self.count = 0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Report; a trial that ASHA stops does not return from here."""
        self.count += 1
        ray.tune.report(metrics[0])


def search(config: Tune, base: Any = None) -> TuneResult:
    """Try settings, write `best.yaml` and `trials.json` to `config.output`.

    `base` are the stage's settings, in place of the file `config.base`.

    Raises:
        ValueError: a searched field is none of the stage's or its range is refused, the metric
            will not be there after every epoch, the cluster is too small, or the name is that of
            another search.
        RuntimeError: no trial reported a finite metric.
    """
    base = base or search_space.settings(config.stage, config.base)
    space = search_space.load(config.stage, config.space)
    search_space.check(base, space)
    fit: Fit = base.fit
    metric = config.goal[0]
    if metric.startswith("val/") and not base.val:
        raise ValueError(f"tune: metric {metric!r} is of validation rows: set --val of the stage.")
    if metric.startswith("val/") and fit.validate_every > 1:
        raise ValueError(
            f"tune: trials are compared by {metric!r} after every epoch: expected "
            f"fit.validate_every 1, got {fit.validate_every}. Leave it out of the stage's settings."
        )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints banners when silent, too
    session.start(dashboard=fit.workers > 0)
    _preflight(config, fit)
    name = config.name or f"tune-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    location = storage.join(storage.absolute(config.storage), name)
    _claim(location, config, base, space)
    base = configs.override(base, {"fit.epochs": config.epochs})
    with tracking.start("tune", config) as parent:
        job = _Job(
            base=base,
            fits=f"{location}-fits",
            parent=parent,
            directory=os.getcwd(),
        )
        tuner = _tuner(config, space, job, location)
        begun = f"{config.trials} trials of {config.stage} begun"
        with progress.watch(
            begun, config.trials, lambda: len({*storage.names(job.fits)} - {SEARCH})
        ):
            grid = tuner.fit()
        result = _result(grid, config)
        # All settings: the file alone trains the best again. A name would be that of another run.
        best = configs.dump(configs.override(base, {**result.params, "fit.name": ""}))
        _write(result, best, config.output)
        parent.metrics({f"best/{metric}": result.value})
        parent.text(best, BEST)
    return result


def _trial(params: dict[str, Any], job: _Job) -> None:
    if os.path.isdir(job.directory):
        os.chdir(job.directory)  # Tune changed it, and the stage's locations may be relative
    session.start()  # Ray is there; but the settings of Ray Data are each process's own
    trial = ray.tune.get_context().get_trial_id()
    # Named after the trial: when the search is restored, the trial finds its own checkpoints.
    changes = {"fit.storage": job.fits, "fit.name": trial}
    config = configs.override(
        job.base, {**params, **changes, "output": f"{job.fits}/{trial}/model"}
    )
    report = Report()
    listener = TuneReportCallback() if config.fit.workers else report
    with tracking.inside(job.parent), launch.listening(listener):
        result: Result = search_space.train(job.base)(config)
    if not (config.fit.workers or report.count):  # it was finished before the search was killed
        ray.tune.report(result.metrics or {})


def _tuner(config: Tune, space: Mapping[str, Mapping], job: _Job, location: str) -> Tuner:
    fit: Fit = job.base.fit
    # With workers the trial only waits for them.
    own = {"CPU": fit.cpus_per_worker, "GPU": fit.gpus_per_worker}
    needs = {"CPU": 0.01} if fit.workers else {name: count for name, count in own.items() if count}
    trainable = ray.tune.with_resources(ray.tune.with_parameters(_trial, job=job), needs)
    if Tuner.can_restore(location):
        return Tuner.restore(location, trainable=trainable, resume_errored=True)
    scheduler = ASHAScheduler(
        time_attr="epoch", max_t=config.epochs, grace_period=config.grace, reduction_factor=3
    )
    metric, mode = config.goal
    return Tuner(
        trainable,
        param_space=search_space.drawn(space),
        tune_config=ray.tune.TuneConfig(
            metric=metric,
            mode=mode,
            num_samples=config.trials,
            max_concurrent_trials=config.concurrent,
            search_alg=OptunaSearch(seed=config.seed),
            scheduler=scheduler,
            reuse_actors=True,  # importing a stage's libraries takes 12 s of a core
        ),
        run_config=ray.tune.RunConfig(
            name=os.path.basename(location),
            storage_path=os.path.dirname(location),
            failure_config=ray.tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )


def _preflight(config: Tune, fit: Fit) -> None:
    shares = config.concurrent * max(fit.workers, 1)
    session.require(
        shares * fit.cpus_per_worker + session.READERS,
        shares * fit.gpus_per_worker,
        f"{config.concurrent} trials at a time and {session.READERS:g} CPU to read",
        "fit.cpus_per_worker of --base",
        "fit.gpus_per_worker of --base",
    )
    if fit.workers and not worker.get_dashboard_url():
        raise ValueError(
            "tune: trials with workers need Ray's dashboard: without it, Ray 2.60 never frees the "
            "CPUs of a trial that was stopped early. Use engine.start(dashboard=True), or "
            "--fit.workers 0 in the stage's settings."
        )


def _claim(location: str, config: Tune, base: Any, space: Mapping) -> None:
    free = ("concurrent", "storage", "name", "output", "base", "space")
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


def _result(grid: ResultGrid, config: Tune) -> TuneResult:
    trials = [
        {
            "trial": (result.metrics or {}).get("trial_id", os.path.basename(result.path)),
            "params": result.config,
            "metrics": {k: v for k, v in (result.metrics or {}).items() if _is_ours(k, v)},
            "error": str(result.error) if result.error else "",
        }
        for result in grid
    ]
    metric, mode = config.goal
    scored = [t for t in trials if math.isfinite(t["metrics"].get(metric, math.nan))]
    if not scored:
        raise RuntimeError(
            f"tune: no trial reported a finite {metric!r}; the first said: "
            f"{trials[0]['error'] or sorted(trials[0]['metrics'])}"
        )
    sign = 1 if mode == "min" else -1
    best = min(scored, key=lambda t: sign * t["metrics"][metric])
    value = best["metrics"][metric]
    return TuneResult(
        params=best["params"], metric=metric, maximise=mode == "max", value=value, trials=trials
    )


def _is_ours(name: str, value: Any) -> bool:
    ours = name.startswith(("train/", "val/", "lr")) or name == "epoch"
    return ours and isinstance(value, int | float)


def _write(result: TuneResult, best: str, output: str) -> None:
    storage.write_text(storage.join(output, BEST), best)
    storage.write_json(storage.join(output, TRIALS), result.trials)
