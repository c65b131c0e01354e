import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from cvmatch.runtime import tracking


@dataclasses.dataclass(frozen=True)
class Fit:
    lr: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Settings:
    margin: float = 0.3
    sizes: tuple[int, ...] = (1, 2)
    fit: Fit = Fit()
    note: str = ""


def record(run):
    return MlflowClient(run.uri).get_run(run.run_id)


def test_start_logs_the_config_and_finishes():
    with tracking.start("matcher", Settings()) as run:
        assert record(run).info.status == "RUNNING"
    found = record(run)
    assert found.info.status == "FINISHED"
    assert found.data.tags["stage"] == "matcher"
    assert found.data.params["fit.lr"] == "0.0001"
    path = MlflowClient(run.uri).download_artifacts(run.run_id, "config.yaml")
    with open(path, encoding="utf-8") as file:
        assert yaml.safe_load(file)["sizes"] == [1, 2]


def test_start_of_a_failing_block_ends_as_failed():
    with pytest.raises(KeyError), tracking.start("matcher", Settings()) as run:
        raise KeyError("lost")
    assert record(run).info.status == "FAILED"


def test_start_of_an_interrupted_block_ends_as_killed():
    with pytest.raises(KeyboardInterrupt), tracking.start("matcher", Settings()) as run:
        raise KeyboardInterrupt
    assert record(run).info.status == "KILLED"
    assert record(run).data.tags["reason"] == "interrupted"


def test_start_with_a_long_and_with_many_params_keeps_them_all():
    many = dataclasses.make_dataclass("Many", [(f"f{n}", int, n) for n in range(230)], frozen=True)
    with tracking.start("matcher", many()) as run:
        pass
    assert record(run).data.params["f229"] == "229"
    assert len(record(run).data.params) == 230
    with tracking.start("matcher", Settings(note="x" * 9000)) as run:
        pass
    assert set(record(run).data.params["note"]) == {"x"}


def test_runs_in_the_block_are_children_also_across_processes():
    with (
        tracking.start("tune", Settings()) as parent,
        tracking.start("matcher", Settings()) as inner,
    ):
        pass
    travelled = pickle.loads(pickle.dumps(parent))
    with tracking.inside(travelled), tracking.start("matcher", Settings()) as trial:
        pass
    with tracking.start("matcher", Settings()) as other:
        pass
    assert record(inner).data.tags[tracking.PARENT] == parent.run_id
    assert record(trial).data.tags[tracking.PARENT] == parent.run_id
    assert tracking.PARENT not in record(other).data.tags


def test_history_gives_the_last_value_of_each_step():
    with tracking.start("matcher", Settings()) as run:
        for step, value in ((0, 3.0), (1, 2.0), (2, 9.0), (2, 1.0)):
            run.metrics({"train/loss": value}, step)
        assert run.history("train/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
        assert run.history("absent") == []


def test_points_beyond_one_call_are_all_there():
    with tracking.start("matcher", Settings()) as run:
        run.points(("step/loss", step, step / 2) for step in range(1200))
        assert run.history("step/loss") == [(step, step / 2) for step in range(1200)]


def test_files_and_pictures_lie_beside_the_store_wherever_a_process_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sheet.txt").write_text("seen")
    with tracking.start("matcher", Settings()) as run:
        run.file("sheet.txt", "sheets")
        run.image("samples", np.zeros((4, 6, 3), np.uint8))
        run.tag("note", "ok")
    place = str(record(run).info.artifact_uri)
    store = os.path.dirname(run.uri.removeprefix("sqlite:///"))
    assert place.startswith(store)
    assert sorted(os.listdir(place)) == ["config.yaml", "samples.png", "sheets"]
    assert os.listdir(tmp_path) == ["sheet.txt"]
    assert record(run).data.tags["note"] == "ok"


def test_store_defaults_to_a_database_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_work_goes_on_untracked_where_no_server_answers(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    begin = time.monotonic()
    with tracking.start("tune", Settings()) as parent, tracking.start("matcher", Settings()) as run:
        run.metrics({"train/loss": 1.0})
        run.text("text", "note.txt")
    tracking.end_runs({"some": ("FINISHED", "")})
    assert time.monotonic() - begin < 60
    assert (parent.run_id, run.run_id) == ("", "")
    assert "cannot be reached, so matcher-" in caplog.text


def test_stores_begun_at_once_in_a_new_directory_are_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def track(number: int) -> str:
        with tracking.start("matcher", Settings(margin=float(number))) as run:
            return run.run_id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(track, range(4)))
    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = store.get_experiment_by_name("cvmatch")
    assert experiment
    found = store.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in found} == set(ids)
    assert {run.info.status for run in found} == {"FINISHED"}
    assert sorted(os.listdir(tmp_path)) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]


def serve(directory, port: int) -> subprocess.Popen:
    """An MLflow server on loopback."""
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--backend-store-uri", f"sqlite:///{directory}/served.db", "--workers", "1"]
    words += ["--artifacts-destination", str(directory / "artifacts")]
    server = subprocess.Popen(
        words, cwd=directory, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.3)
        else:
            return server
    raise TimeoutError("the MLflow server did not start")


def end(server: subprocess.Popen) -> None:
    os.killpg(server.pid, signal.SIGKILL)  # with its workers
    server.wait()


@pytest.mark.slow
def test_server_that_is_away_for_a_moment_gets_all_later(tmp_path, monkeypatch, caplog):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "AWAY_S", 1.0)
    server = serve(tmp_path, port)
    try:
        with tracking.start("matcher", Settings()) as run:
            run.metrics({"train/loss": 3.0}, 0)
            end(server)
            run.metrics({"train/loss": 2.0}, 1)
            run.text("text", "note.txt")
            assert "is away, the work goes on" in caplog.text
            server = serve(tmp_path, port)
            run.metrics({"train/loss": 1.0}, 2)
        assert run.history("train/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
        assert record(run).info.status == "FINISHED"
    finally:
        end(server)
