"""MLflow: one run for each training, search or evaluation.

Only MlflowClient, never the fluent API: `mlflow.set_experiment` exports an environment variable
that Ray's processes inherit and that wins over whatever they ask for (MLflow 3.17, measured).
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from cvmatch import config as configs

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT = "mlflow.parentRunId"
"""Tag by which MLflow's pages nest a run under its parent."""

_PARAMS = 100
_METRICS = 1000
_LENGTH = 500
"""Limits of MLflow's API: params and metrics a call, characters a param (the oldest servers')."""


@dataclass(frozen=True)
class Run:
    """A run by its address, so that it travels to other processes."""

    uri: str
    """Tracking URI."""
    run_id: str
    """MLflow's id."""

    def metrics(self, values: Mapping[str, float | int], step: int = 0) -> None:
        """Log values at a step."""
        self.points((name, step, value) for name, value in values.items())

    def points(self, points: Iterable[tuple[str, int, float | int]]) -> None:
        """Log (name, step, value) triples in few calls."""
        now = int(time.time() * 1000)
        metric = _mlflow().entities.Metric
        entries = [metric(name, float(value), now, int(step)) for name, step, value in points]
        for begin in range(0, len(entries), _METRICS):
            self._client.log_batch(self.run_id, metrics=entries[begin : begin + _METRICS])

    def file(self, path: str, folder: str = "") -> None:
        """Keep a local file, or a directory with all in it, under `folder` of the run."""
        if os.path.isdir(path):
            self._client.log_artifacts(self.run_id, path, folder or None)
        else:
            self._client.log_artifact(self.run_id, path, folder or None)

    def text(self, text: str, name: str) -> None:
        """Keep `text` as the file `name`."""
        self._client.log_text(self.run_id, text, name)

    def image(self, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Keep a picture as `<name>.png`."""
        self._client.log_image(self.run_id, pixels, artifact_file=f"{name}.png")

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._client.set_tag(self.run_id, name, value)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in the order of steps; the last value logged at each step."""
        points = self._client.get_metric_history(self.run_id, name)
        latest = {point.step: point.value for point in points}
        return sorted(latest.items())

    @property
    def _client(self) -> "MlflowClient":
        return _mlflow().MlflowClient(self.uri)


_current: ContextVar[Run | None] = ContextVar("cvmatch_run", default=None)


@contextlib.contextmanager
def start(stage: str, config: Any, parent: Run | None = None) -> Iterator[Run]:
    """Log a run of `stage` in the block: FINISHED at its end, KILLED by Ctrl-C, else FAILED.

    It is named as `config.fit.name` or `config.name` says, else after stage and time. `config`
    becomes its params (dotted names) and its file config.yaml. `parent` defaults to the
    run of the surrounding `start` or `inside` block.
    """
    parent = parent or _current.get()
    uri = parent.uri if parent else tracking_uri()
    client = _mlflow().MlflowClient(uri)
    tags = {"stage": stage} | ({PARENT: parent.run_id} if parent else {})
    name = _name_of(config) or f"{stage}-{time.strftime('%m%d-%H%M%S')}"
    created = client.create_run(_experiment(client), tags=tags, run_name=name)
    run = Run(uri, created.info.run_id)
    param = _mlflow().entities.Param
    params = [param(k, str(v)[:_LENGTH]) for k, v in configs.flat(config).items()]
    for begin in range(0, len(params), _PARAMS):
        client.log_batch(run.run_id, params=params[begin : begin + _PARAMS])
    run.text(configs.dump(config), "config.yaml")
    status = "FAILED"
    try:
        with inside(run):
            yield run
        status = "FINISHED"
    except SystemExit:
        status = ""  # Tune ends the thread of a trial so, and the search says why: `end_runs`
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        run.tag("reason", "interrupted")
        raise
    finally:
        if status:
            client.set_terminated(run.run_id, status)


def end_runs(states: Mapping[str, tuple[str, str]]) -> None:
    """Set MLflow's status, and the tag `reason`, of the runs of these names.

    Of several runs of a name (it was restarted) the last one gets them; others that still run in
    MLflow's eyes were killed.
    """
    client = _mlflow().MlflowClient(tracking_uri())
    experiment = _experiment(client)
    for name, (status, reason) in states.items():
        runs = client.search_runs(
            [experiment], f"attributes.run_name = '{name}'", order_by=["attributes.start_time DESC"]
        )
        for index, run in enumerate(runs):
            if index == 0:
                client.set_terminated(run.info.run_id, status)
                if reason:
                    client.set_tag(run.info.run_id, "reason", reason)
            elif run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")


@contextlib.contextmanager
def inside(run: Run) -> Iterator[None]:
    """Runs started in the block are children of `run`, which may come from another process."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{os.path.abspath('mlflow.db')}"


def _name_of(config: Any) -> str:
    return getattr(getattr(config, "fit", config), "name", "")


def _experiment(client: "MlflowClient") -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cvmatch")
    if experiment := client.get_experiment_by_name(name):
        return experiment.experiment_id
    artifacts = None
    if client.tracking_uri.startswith("sqlite:///"):
        # The default is ./mlruns of whichever process came first, such as a Ray worker's.
        file = client.tracking_uri.removeprefix("sqlite:///")
        artifacts = os.path.join(os.path.dirname(os.path.abspath(file)), "mlartifacts")
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except _mlflow().exceptions.MlflowException as error:
        experiment = client.get_experiment_by_name(name)  # another process was faster
        if experiment is None:
            raise error
        return experiment.experiment_id


def _mlflow() -> ModuleType:
    # Not at the top: importing it takes 3 s and 150 MB in each of Ray's workers, and only the
    # driver and the controller log.
    import mlflow  # noqa: PLC0415

    return mlflow
