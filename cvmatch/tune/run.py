"""Search a stage's settings: trials of its train(), proposed by Optuna, poor ones stopped early.

A trial is one call of the stage's own train(), with some fields replaced by name (`fit.seed`,
`margin`). The search is its name and storage: the same command again goes on where it was killed.
"""

import dataclasses
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
import ray.tune
from ray.train import Checkpoint, UserCallback
from ray.tune import ResultGrid, Tuner
from ray.tune.integration.ray_train import TuneReportCallback

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.runtime import pools, progress, session, tracking
from cvmatch.training import launch
from cvmatch.training.settings import TrainConfig
from cvmatch.tune import proposals, search_space
from cvmatch.tune.page import write_tune_page
from cvmatch.tune.settings import Stage, Tune
from cvmatch.tune.trials import TrialState, TrialSummary

BEST, TRIALS, SEARCH = "best.yaml", "trials.json", "search.json"

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
    """Metric of the best trial, after its last epoch."""
    trials: list[TrialSummary]
    """All trials."""


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What all trials share."""

    name: str
    train: Callable[[Any], Any] | None
    """None: the stage's own, which the driver does not import."""
    stage: Stage
    base: Any
    fits: str
    parent: tracking.Run
    directory: str

    def run_name(self, trial_id: str) -> str:
        """Name of a trial's training, by which it finds its checkpoints when it is restored."""
        return f"{self.name}-{trial_id}"


class _TuneReporter(UserCallback):
    """Reports each epoch of a training in the trial's own process to Tune."""

    def __init__(self) -> None:
        self.count = 0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, int | float]], checkpoint: Checkpoint | None
    ) -> None:
        """Report; a trial that ASHA stops does not return from here."""
        self.count += 1
        ray.tune.report(metrics[0])


class _EndedTrials(ray.tune.Callback):
    """Counts the trials that ended, for the progress; in the driver, one search at a time."""

    count: ClassVar[int] = 0  # of the class: a restored search unpickles a callback of its own

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Count anew, trials of before the search was restored too."""
        _EndedTrials.count = sum(trial.is_finished() for trial in trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Count a last time."""
        self.on_step_end(0, trials)


def search(config: Tune, base: Any = None, train: Callable[[Any], Any] | None = None) -> TuneResult:
    """Try settings, write `best.yaml`, `trials.json` and the page `tune.html` to `config.output`.

    Args:
        config: What is searched, and for how long.
        base: The stage's settings, in place of the file `config.base`.
        train: Trains with such settings, in place of the stage's own train().

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
    fit: TrainConfig = base.fit
    _check_measured(config, base)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints banners when silent, too
    _preflight(config, fit)
    session.start(dashboard=fit.workers > 0)
    if fit.workers and not session.has_dashboard():
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
        shared = _Search(
            name=name,
            train=train,
            stage=config.stage,
            base=base,
            fits=f"{location}-fits",
            parent=parent,
            directory=os.getcwd(),
        )
        tuner = _build_tuner(config, space, first, shared, location)
        _EndedTrials.count = 0
        label = f"{config.trials} trials of {config.stage} ended"
        with progress.watch(label, config.trials, lambda: _EndedTrials.count):
            grid = tuner.fit()
        trials = _describe_trials(grid, config)
        tracking.end_runs(
            {shared.run_name(trial["trial"]): _RUN_STATES[trial["state"]] for trial in trials}
        )
        if _EndedTrials.count < config.trials:
            raise KeyboardInterrupt  # Tune takes Ctrl-C, saves its state, and returns
        result = _choose_best(trials, config)
        # All settings: the file alone trains the best again. A name would be that of another run.
        changes = {**result.params, **_alone(base), "fit.name": ""}
        best = configs.dump(configs.override(base, changes))
        _write(result, best, config.output)
        write_tune_page(config, space, trials, best)
        parent.metrics({f"best/{config.goal[0]}": result.value})
        parent.text(best, BEST)
    return result


def _alone(base: Any) -> dict[str, object]:
    """Return what differs without workers: Tune gives the GPU of a trial to its process."""
    return {} if base.fit.workers else {"fit.gpus_per_worker": 0}


def _run_trial(params: Mapping[str, Any], search: _Search) -> None:
    if os.path.isdir(search.directory):
        os.chdir(search.directory)  # Tune changed it, and the stage's locations may be relative
    session.start()  # Ray is there; but the settings of Ray Data are each process's own
    name = search.run_name(ray.tune.get_context().get_trial_id())
    changes = {"fit.storage": search.fits, "fit.name": name, **_alone(search.base)}
    config = configs.override(
        search.base, {**params, **changes, "output": f"{search.fits}/{name}/model"}
    )
    reporter = _TuneReporter()
    listener = TuneReportCallback() if config.fit.workers else reporter
    with tracking.inside(search.parent), launch.report_to(listener):
        result = (search.train or search_space.load_train(search.stage))(config)
    if not (config.fit.workers or reporter.count):  # it was finished before the search was killed
        ray.tune.report(result.metrics)


def _check_measured(config: Tune, base: Any) -> None:
    """Check that the stage measures the metric by which trials are compared.

    Raises:
        ValueError: it does not.
    """
    metric = config.goal[0]
    if metric.startswith("val/") and not getattr(base, "held_out", base.val):
        raise ValueError(f"tune: metric {metric!r} is of validation rows: set --val of the stage.")
    of_samples = config.stage == "generator" and not metric.startswith(("val/loss", "val/gap"))
    if metric.startswith("val/") and of_samples and not base.validation_images:
        raise ValueError(
            f"tune: metric {metric!r} is of sampled pictures, got validation_images 0. Set it in "
            "the stage's settings, or pass --metric val/loss (which the image losses only worsen)."
        )


def _build_tuner(
    config: Tune,
    space: search_space.Space,
    first: list[search_space.Point],
    search: _Search,
    location: str,
) -> Tuner:
    fit: TrainConfig = search.base.fit
    # With workers the trial only waits for them.
    share = {"CPU": fit.cpus_per_worker, "GPU": fit.gpus_per_worker}
    needs = {"CPU": 0.01} if fit.workers else {name: n for name, n in share.items() if n}
    trainable = ray.tune.with_resources(ray.tune.with_parameters(_run_trial, search=search), needs)
    if Tuner.can_restore(location):
        return Tuner.restore(location, trainable=trainable, resume_errored=True)
    metric, mode = config.goal
    return Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            metric=metric,
            mode=mode,
            num_samples=config.trials,
            max_concurrent_trials=config.concurrent,
            search_alg=proposals.build_search(config, space, first),
            scheduler=proposals.build_scheduler(config),
            reuse_actors=True,  # importing a stage's libraries takes 12 s of a core
        ),
        run_config=ray.tune.RunConfig(
            name=os.path.basename(location),
            storage_path=os.path.dirname(location),
            failure_config=ray.tune.FailureConfig(max_failures=1),
            callbacks=[_EndedTrials()],
            verbose=0,
        ),
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


def _describe_trials(grid: ResultGrid, config: Tune) -> list[TrialSummary]:
    return [
        TrialSummary(
            trial=(result.metrics or {}).get("trial_id", os.path.basename(result.path)),
            params=result.config,
            metrics={k: v for k, v in (result.metrics or {}).items() if _is_ours(k, v)},
            error=str(result.error) if result.error else "",
            state=_state(result, config.epochs),
            history=_read_history(result, config.goal[0]),
            seconds=float((result.metrics or {}).get("time_total_s", 0.0)),
        )
        for result in grid
    ]


def _read_history(result: Any, metric: str) -> list[list[int | float]]:
    frame = result.metrics_dataframe
    if frame is None or metric not in frame:
        return []
    return [[int(e), float(v)] for e, v in zip(frame["epoch"], frame[metric], strict=True)]


def _state(result: Any, epochs: int) -> TrialState:
    if result.error:
        return "failed"
    return "finished" if (result.metrics or {}).get("epoch", 0) >= epochs else "stopped early"


def _choose_best(trials: list[TrialSummary], config: Tune) -> TuneResult:
    metric, mode = config.goal
    scored = [t for t in trials if math.isfinite(t["metrics"].get(metric, math.nan))]
    if not scored:
        raise RuntimeError(
            f"tune: no trial reported a finite {metric!r}; the first said: "
            f"{trials[0]['error'] or sorted(trials[0]['metrics'])}"
        )
    sign = 1 if mode == "min" else -1
    best = min(scored, key=lambda t: sign * t["metrics"][metric])
    params, value = best["params"], best["metrics"][metric]
    assert params is not None, "a trial that reported has begun"
    return TuneResult(
        params=params, metric=metric, maximise=mode == "max", value=value, trials=trials
    )


def _is_ours(name: str, value: Any) -> bool:
    ours = name.startswith(("train/", "val/", "lr")) or name == "epoch"
    return ours and isinstance(value, int | float)


def _write(result: TuneResult, best: str, output: str) -> None:
    storage.write_text(storage.join(output, BEST), best)
    storage.write_json(storage.join(output, TRIALS), result.trials)
