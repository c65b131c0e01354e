"""MLflow: one run for each training, search or evaluation.

Only MlflowClient, never the fluent API: `mlflow.set_experiment` exports an environment variable
that Ray's processes inherit and that wins over whatever they ask for (MLflow 3.17, measured).

To track is no work: what a server does not take now is kept and sent later, and its loss is a
warning. A run that a server cannot begin is not tracked.
"""

import collections
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
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

_SQLITE = "sqlite:///"

_PARAMS = 100
_METRICS = 1000
_LENGTH = 500
"""Limits of MLflow's API: params and metrics a call, characters a param (the oldest servers')."""

_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""MLflow's own patience; by default a server that is away holds a call for 4 minutes."""

AWAY_S = 15.0
"""Seconds before a server that did not answer is asked again."""

LAST_S = 60.0
"""Seconds for which the end of a run waits for a server that is away."""

_KEPT = 10_000
"""Calls that are kept for a server that is away; of more, the first are lost."""

_log = logging.getLogger(__name__)


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
            some = entries[begin : begin + _METRICS]
            self._send(lambda client, some=some: client.log_batch(self.run_id, metrics=some))

    def file(self, path: str, folder: str = "") -> None:
        """Keep a local file, or a directory with all in it, under `folder` of the run."""
        whole = os.path.isdir(path)
        self._send(
            lambda client: (client.log_artifacts if whole else client.log_artifact)(
                self.run_id, path, folder or None
            )
        )

    def text(self, text: str, name: str) -> None:
        """Keep `text` as the file `name`."""
        self._send(lambda client: client.log_text(self.run_id, text, name))

    def image(self, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Keep a picture as `<name>.png`."""
        self._send(
            lambda client: client.log_image(self.run_id, pixels, artifact_file=f"{name}.png")
        )

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._send(lambda client: client.set_tag(self.run_id, name, value))

    def end(self, status: str) -> None:
        """Say how the run ended, and wait a little for a server that is away."""
        self._send(lambda client: client.set_terminated(self.run_id, status))
        if self.run_id:
            _outbox(self.uri).close(self.run_id)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in the order of steps; the last value logged at each step."""
        if not self.run_id:
            return []
        points = _client(self.uri).get_metric_history(self.run_id, name)
        latest = {point.step: point.value for point in points}
        return sorted(latest.items())

    def _send(self, call: "Call") -> None:
        if self.run_id:
            _outbox(self.uri).send(self.run_id, call)


Call = Callable[["MlflowClient"], Any]


class _Outbox:
    """Calls to a server in their order; those that it cannot take now wait."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.waiting: collections.deque[tuple[str, Call]] = collections.deque(maxlen=_KEPT)
        self.next_try = 0.0
        self.lock = threading.RLock()

    def send(self, run_id: str, call: Call) -> None:
        """Make a call, after those that wait."""
        with self.lock:
            self.waiting.append((run_id, call))
            if time.monotonic() >= self.next_try:
                self._flush()

    def close(self, run_id: str) -> None:
        """Make the calls of a run that wait, or give them up."""
        until = time.monotonic() + LAST_S
        while self._of(run_id) and time.monotonic() < until:
            with self.lock:
                self._flush()
            time.sleep(1.0 if self._of(run_id) else 0.0)
        if lost := self._of(run_id):
            _log.warning("MLflow %s: lost %d entries of run %s.", self.uri, len(lost), run_id)
            with self.lock:
                others = [entry for entry in self.waiting if entry[0] != run_id]
                self.waiting = collections.deque(others, maxlen=_KEPT)

    def _of(self, run_id: str) -> list[tuple[str, Call]]:
        with self.lock:
            return [entry for entry in self.waiting if entry[0] == run_id]

    def _flush(self) -> None:
        while self.waiting:
            try:
                self.waiting[0][1](_client(self.uri))
            except Exception as error:  # noqa: BLE001 (stores and servers raise whatever they like)
                if not _answers(self.uri):
                    _log.warning("MLflow %s is away, the work goes on: %s", self.uri, error)
                    self.next_try = time.monotonic() + AWAY_S
                    return
                _log.warning("MLflow %s did not take an entry: %s", self.uri, error)
            self.waiting.popleft()


def _answers(uri: str) -> bool:
    """Return whether the server is there; what it does not take then, it never will."""
    try:
        _client(uri).search_experiments(max_results=1)
    except Exception:  # noqa: BLE001 (stores and servers raise whatever they like)
        return False
    return True


_outboxes: dict[str, _Outbox] = {}


def _outbox(uri: str) -> _Outbox:
    return _outboxes.setdefault(uri, _Outbox(uri))


_current: ContextVar[Run | None] = ContextVar("cvmatch_run", default=None)


@contextlib.contextmanager
def start(stage: str, config: Any, parent: Run | None = None) -> Iterator[Run]:
    """Log a run of `stage` in the block: FINISHED at its end, KILLED by Ctrl-C, else FAILED.

    It is named as `config.fit.name` or `config.name` says, else after stage and time. `config`
    becomes its params (dotted names) and its file config.yaml. `parent` defaults to the
    run of the surrounding `start` or `inside` block.
    """
    parent = parent or _current.get()
    run = _begin(stage, config, parent)
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
            run.end(status)


def _begin(stage: str, config: Any, parent: Run | None) -> Run:
    """Create a run; one that is not tracked (without an id) where that cannot be done."""
    uri = parent.uri if parent else tracking_uri()
    tags = {"stage": stage} | ({PARENT: parent.run_id} if parent and parent.run_id else {})
    name = _name_of(config) or f"{stage}-{time.strftime('%m%d-%H%M%S')}"
    try:
        client = _client(uri)
        created = client.create_run(_experiment(client), tags=tags, run_name=name)
    except Exception as error:  # noqa: BLE001 (stores and servers raise whatever they like)
        _log.warning("MLflow %s cannot be reached, so %s is not tracked: %s", uri, name, error)
        return Run(uri, "")
    run = Run(uri, created.info.run_id)
    param = _mlflow().entities.Param
    params = [param(k, str(v)[:_LENGTH]) for k, v in configs.flat(config).items()]
    for begin in range(0, len(params), _PARAMS):
        some = params[begin : begin + _PARAMS]
        run._send(lambda client, some=some: client.log_batch(run.run_id, params=some))
    run.text(configs.dump(config), "config.yaml")
    return run


def end_runs(states: Mapping[str, tuple[str, str]]) -> None:
    """Set MLflow's status, and the tag `reason`, of the runs of these names.

    Of several runs of a name (it was restarted) the last one gets them; others that still run in
    MLflow's eyes were killed.
    """
    try:
        client = _client(tracking_uri())
        for name, (status, reason) in states.items():
            _end_run(client, name, status, reason)
    except Exception as error:  # noqa: BLE001 (stores and servers raise whatever they like)
        _log.warning("MLflow %s: the trials' states are not set: %s", tracking_uri(), error)


def _end_run(client: "MlflowClient", name: str, status: str, reason: str) -> None:
    runs = client.search_runs(
        [_experiment(client)],
        f"attributes.run_name = '{name}'",
        order_by=["attributes.start_time DESC"],
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


def _client(uri: str) -> "MlflowClient":
    if uri.startswith(_SQLITE):
        _create_store(uri.removeprefix(_SQLITE))
    return _mlflow().MlflowClient(uri)


def _create_store(file: str) -> None:
    """Create a SQLite store aside, then rename it: MLflow's own creation is no transaction."""
    if os.path.exists(file):
        return
    from filelock import FileLock  # noqa: PLC0415 (once in the life of a store)

    with FileLock(f"{file}.lock"):
        if not os.path.exists(file):
            aside = f"{file}.{uuid.uuid4().hex}.tmp"
            _mlflow().MlflowClient(f"{_SQLITE}{aside}").search_experiments()
            os.replace(aside, file)


def _experiment(client: "MlflowClient") -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cvmatch")
    if experiment := client.get_experiment_by_name(name):
        return experiment.experiment_id
    artifacts = None
    if client.tracking_uri.startswith(_SQLITE):
        # The default is ./mlruns of whichever process came first, such as a Ray worker's.
        file = client.tracking_uri.removeprefix(_SQLITE)
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
    for name, value in _HTTP.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: PLC0415

    return mlflow
