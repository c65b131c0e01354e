"""What a trial runs, and Ray Tune's part of a search."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
import ray.tune
from ray.train import Checkpoint, UserCallback
from ray.tune import ResultGrid, Tuner
from ray.tune.integration.ray_train import TuneReportCallback

from cvmatch import config as configs
from cvmatch.runtime import session, tracking
from cvmatch.training import launch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.settings import TrainConfig
from cvmatch.tune import proposals, search_space
from cvmatch.tune.search_space import Point, Space
from cvmatch.tune.settings import Stage, Tune
from cvmatch.tune.trials import TrialState, TrialSummary

_GOES_ON = "goes_on"
"""Metric of a trial whose training had begun before its process did."""

TEST = "test/"
"""Names of metrics of the rows of `Tune.test` begin with it."""


@dataclass(frozen=True, kw_only=True)
class StageCode:
    """What a stage does, where it is not the stage's own (which the driver does not import)."""

    train: Callable[[Any], TrainResult]
    measure: Callable[[Any, str], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Search:
    """What all trials share."""

    name: str
    code: StageCode | None
    """None: the stage's own."""
    stage: Stage
    base: Any
    """Settings of the stage."""
    val: Any
    """Rows that no trial sees, in place of `val` of `base`; None: nothing is measured on them."""
    fits: str
    """Where trainings keep their runs."""
    parent: tracking.Run
    directory: str
    """Working directory of the driver."""

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


class EndedTrials(ray.tune.Callback):
    """Counts the trials that ended, for the progress; in the driver, one search at a time."""

    count: ClassVar[int] = 0  # of the class: a restored search unpickles a callback of its own

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Count anew, trials of before the search was restored too."""
        EndedTrials.count = sum(trial.is_finished() for trial in trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Count a last time."""
        self.on_step_end(0, trials)


def only_process(base: Any) -> dict[str, object]:
    """Return what differs without workers: Tune gives the GPU of a trial to its process."""
    return {} if base.fit.workers else {"fit.gpus_per_worker": 0}


def build_tuner(
    config: Tune, space: Space, first: list[Point], search: Search, location: str
) -> Tuner:
    """Build the Tuner of the search, or restore it where there is one at `location`."""
    trainable = _build_trainable(_run_trial, search)
    if Tuner.can_restore(location):
        return Tuner.restore(location, trainable=trainable, resume_errored=True)
    metric, mode = config.goal
    tune_config = ray.tune.TuneConfig(
        metric=proposals.tune_name(metric),
        mode=mode,
        num_samples=config.trials,
        max_concurrent_trials=config.concurrent,
        search_alg=proposals.build_search(config, space, first),
        scheduler=proposals.build_scheduler(config),
        reuse_actors=True,  # importing a stage's libraries takes 12 s of a core
    )
    return Tuner(trainable, tune_config=tune_config, run_config=_run_config(location))


def build_repeats(
    config: Tune, points: Sequence[Mapping[str, Any]], search: Search, location: str
) -> Tuner:
    """Build the Tuner that trains each of some settings in full, or restore it."""
    trainable = _build_trainable(_run_repeat, search, points=points)
    if Tuner.can_restore(location):
        return Tuner.restore(location, trainable=trainable, resume_errored=True)
    tune_config = ray.tune.TuneConfig(max_concurrent_trials=config.concurrent, reuse_actors=True)
    return Tuner(
        trainable,
        param_space={"number": ray.tune.grid_search(list(range(len(points))))},
        tune_config=tune_config,
        run_config=_run_config(location),
    )


def _build_trainable(run: Callable[..., None], search: Search, **parameters: Any) -> Any:
    fit: TrainConfig = search.base.fit
    # With workers the trial only waits for them.
    share = {"CPU": fit.cpus_per_worker, "GPU": fit.gpus_per_worker}
    needs = {"CPU": 0.01} if fit.workers else {name: n for name, n in share.items() if n}
    bound = ray.tune.with_parameters(run, search=search, **parameters)
    return ray.tune.with_resources(bound, needs)


def _run_config(location: str) -> ray.tune.RunConfig:
    return ray.tune.RunConfig(
        name=os.path.basename(location),
        storage_path=os.path.dirname(location),
        failure_config=ray.tune.FailureConfig(max_failures=1),
        callbacks=[EndedTrials()],
        verbose=0,
    )


def _run_trial(params: Mapping[str, Any], search: Search) -> None:
    config = _configure(params, search)
    goes_on = launch.has_begun(config.fit)
    reporter = _TuneReporter()
    listener = TuneReportCallback() if config.fit.workers else reporter
    with tracking.inside(search.parent), launch.report_to(listener):
        result = _load(search).train(config)
    if goes_on:  # it may have been finished before the search was killed, and reported nothing
        ray.tune.report({**result.metrics, _GOES_ON: 1})


def _run_repeat(params: Mapping[str, Any], search: Search, points: Sequence[Point]) -> None:
    """Train in full, and measure on rows that no trial sees; report once."""
    config = _configure(points[params["number"]], search)
    code = _load(search)
    with tracking.inside(search.parent):
        result = code.train(config)
        metrics = dict(result.metrics)
        if search.val is not None:
            measured = code.measure(
                configs.override(config, {"val": search.val}), result.checkpoint
            )
            metrics |= {name.replace("val/", TEST, 1): value for name, value in measured.items()}
    ray.tune.report(metrics)


def _configure(params: Mapping[str, Any], search: Search) -> Any:
    """Return a trial's settings, in whose working directory this process is from now on."""
    if os.path.isdir(search.directory):
        os.chdir(search.directory)  # Tune changed it, and the stage's locations may be relative
    session.start()  # Ray is there; but the settings of Ray Data are each process's own
    name = search.run_name(ray.tune.get_context().get_trial_id())
    changes = {"fit.storage": search.fits, "fit.name": name, **only_process(search.base)}
    return configs.override(
        search.base, {**params, **changes, "output": f"{search.fits}/{name}/model"}
    )


def _load(search: Search) -> StageCode:
    return search.code or StageCode(
        train=search_space.load_train(search.stage), measure=search_space.load_measure(search.stage)
    )


def describe_trials(grid: ResultGrid, metric: str, epochs: int) -> list[TrialSummary]:
    """Return the trials of a Tuner; their history is of `metric`."""
    return [
        TrialSummary(
            trial=(result.metrics or {}).get("trial_id", os.path.basename(result.path)),
            params=result.config,
            metrics={k: v for k, v in (result.metrics or {}).items() if _is_ours(k, v)},
            error=str(result.error) if result.error else "",
            state=_state(result, epochs),
            history=_read_history(result, metric),
            seconds=_count_seconds(result.metrics or {}),
        )
        for result in grid
    ]


def _count_seconds(metrics: Mapping[str, Any]) -> float:
    """Return what a trial took; NaN where it was begun anew, since Tune counts from there."""
    return math.nan if _GOES_ON in metrics else float(metrics.get("time_total_s", math.nan))


def _read_history(result: Any, metric: str) -> list[list[int | float]]:
    frame = result.metrics_dataframe
    if frame is None or proposals.tune_name(metric) not in frame:
        return []
    values = frame[proposals.tune_name(metric)]
    by_epoch = {int(e): float(v) for e, v in zip(frame["epoch"], values, strict=True)}
    return [[epoch, value] for epoch, value in by_epoch.items()]


def _state(result: Any, epochs: int) -> TrialState:
    if result.error:
        return "failed"
    return "finished" if (result.metrics or {}).get("epoch", 0) >= epochs else "stopped early"


def _is_ours(name: str, value: Any) -> bool:
    ours = name.startswith(("train/", "val/", TEST, "lr")) or name == "epoch"
    return ours and isinstance(value, int | float)
