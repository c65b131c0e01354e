"""Runs that start, resume, repeat and publish; in this process and in Ray Train's workers."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import ray
import ray.data
import torch
from mlflow import MlflowClient
from ray.train import UserCallback
from safetensors.torch import load_file

from cvmatch import config as configs
from cvmatch.data import images, storage
from cvmatch.runtime import tracking
from cvmatch.training import checkpoints, launch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.settings import TrainConfig
from cvmatch.training.task import EpochOrder
from tests.helpers.stage import LINE, LineTask, rename_run, rows


@dataclasses.dataclass(frozen=True)
class Settings:
    fit: TrainConfig


class Listener(UserCallback):
    def __init__(self):
        self.seen = []

    def after_report(self, run_context, metrics, checkpoint):
        self.seen.append(metrics[0]["epoch"])


@pytest.mark.ray
def test_training_learns_and_publishes_the_model(ray_session, fit, tmp_path):
    longer = dataclasses.replace(fit, epochs=12, cache=True, warmup=0.0)
    result = launch.train(functools.partial(LineTask, 0.5), rows(64), rows(13, seed=1), longer)
    history = result.history
    assert list(history["epoch"]) == list(range(1, 13))
    assert history["val/loss"].iloc[-1] < 0.05 * history["val/loss"].iloc[0]
    output = launch.publish(result, str(tmp_path / "model"))
    weights = load_file(os.path.join(output, "line.safetensors"))
    torch.testing.assert_close(
        weights["line.weight"][0], torch.tensor([1.0, 2.0, 3.0, 4.0]), atol=0.3, rtol=0
    )
    assert weights["seen"] == 64 * 12  # each row once an epoch


@pytest.mark.ray
def test_training_of_this_process_keeps_and_finds_its_checkpoints_in_an_object_store(
    ray_session, bucket, fit
):
    far = dataclasses.replace(fit, epochs=2, storage=f"{bucket}/runs", name="far")
    build = functools.partial(LineTask, 0.5)
    result = launch.train(build, rows(64), rows(13, seed=1), far)
    assert result.checkpoint.startswith(f"{bucket}/runs/far/epoch_")
    assert "state.pt" in storage.names(f"{bucket}/runs/far/epoch_0002")
    longer = dataclasses.replace(far, epochs=3)
    history = launch.train(build, rows(64), rows(13, seed=1), longer).history
    assert list(history["epoch"]) == [1, 2, 3]
    losses = history["val/loss"].tolist()
    assert losses[:2] == result.history["val/loss"].tolist()
    assert losses[2] < losses[1]


@pytest.mark.ray
def test_training_asks_for_its_order_with_its_model_and_keeps_it(ray_session, fit, tmp_path):
    asked = []

    def ordered(model: str, epoch: int):
        path = os.path.join(model, "line.safetensors")
        asked.append(load_file(path)["seen"].item() if model else epoch)
        return rows(16, seed=len(asked))

    def weights(name: str, shuffle: int):
        config = rename_run(fit, name, epochs=5, shuffle=shuffle)
        result = launch.train(LINE, rows(99), None, config, None, EpochOrder(2, ordered))
        assert list(result.history["epoch"]) == [1, 2, 3, 4, 5]
        return load_file(f"{result.checkpoint}/model/line.safetensors")

    found = weights("ordered", shuffle=64)
    assert asked == [0, 32, 64]  # before epochs 1, 3 and 5, of 16 rows each
    asked.clear()
    assert torch.equal(found["line.weight"], weights("again", shuffle=0)["line.weight"])


@pytest.mark.ray
def test_training_with_an_order_goes_on_from_where_it_stopped(ray_session, fit):
    def train(asked: list, name: str, epochs: int) -> TrainResult:
        config = rename_run(fit, name, epochs=epochs, schedule="constant", warmup=0.0)
        order = EpochOrder(2, lambda model, epoch: asked.append(model) or rows(16))
        return launch.train(LINE, rows(99), None, config, None, order)

    whole, parts = ([], [])
    for asked, name, stops in ((whole, "whole", [5]), (parts, "parts", [3, 5])):
        *_, result = [train(asked, name, epochs) for epochs in stops]
        weights = load_file(f"{result.checkpoint}/model/line.safetensors")
        asked.append(weights["line.weight"])
    assert [bool(model) for model in parts[:-1]] == [False, True, True, True]  # 3: cut short
    assert torch.equal(whole[-1], parts[-1])


@pytest.mark.ray
def test_training_of_rows_made_anew_at_their_place_is_another_run(ray_session, fit):
    run = rename_run(fit, "rows", epochs=1)
    first = launch.train(LINE, rows(19), None, run, input_fingerprint="one")
    assert launch.train(LINE, rows(19), None, run, input_fingerprint="one").metrics == first.metrics
    with pytest.raises(ValueError, match="input_fingerprint: 'one' before, now 'two'"):
        launch.train(LINE, rows(19), None, run, input_fingerprint="two")


class PictureTask(LineTask):
    """A line whose validation shows a picture."""

    def summary(self, means: dict[str, torch.Tensor]) -> dict[str, float | np.ndarray]:
        return {**super().summary(means), "shade": np.full((2, 3, 3), 7, np.uint8)}


@pytest.mark.ray
def test_training_keeps_the_pictures_of_a_validation_in_the_checkpoint_and_the_run(
    ray_session, fit, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    build = functools.partial(PictureTask, 0.05)
    with tracking.start("line", Settings(fit)) as run:
        result = launch.train(build, rows(19), rows(13, seed=1), rename_run(fit, "shown"), run)
    with open(f"{result.checkpoint}/shade.png", "rb") as file:
        assert (images.decode(file.read()) == 7).all()
    client = MlflowClient(run.uri)
    kept = [file.path for file in client.list_artifacts(run.run_id, "shade")]
    assert kept == [f"shade/epoch_{epoch:04d}.png" for epoch in (1, 2, 3)]


@pytest.mark.ray
def test_finished_run_again_gives_its_result_without_an_epoch(ray_session, fit):
    once = rename_run(fit, "line")
    before = launch.train(LINE, rows(32), rows(8), once)
    changed = os.stat(f"{before.path}/epoch_0003/state.pt").st_mtime_ns
    again = launch.train(LINE, rows(32), rows(8), once)
    assert again.metrics == before.metrics
    assert again.checkpoint == before.checkpoint
    assert os.stat(f"{before.path}/epoch_0003/state.pt").st_mtime_ns == changed


@pytest.mark.ray
def test_run_with_more_epochs_goes_on_and_with_other_settings_is_refused(ray_session, fit):
    first = rename_run(fit, "line", schedule="constant", warmup=0.0)
    launch.train(LINE, rows(32), None, first)
    longer = launch.train(LINE, rows(32), None, dataclasses.replace(first, epochs=5))
    straight = dataclasses.replace(first, name="straight", epochs=5)
    assert launch.train(LINE, rows(32), None, straight).metrics == longer.metrics
    with pytest.raises(ValueError, match=r"fit.batch: 8 before, now 4.*--fit.name"):
        launch.train(LINE, rows(32), None, dataclasses.replace(first, batch=4))
    with pytest.raises(ValueError, match="other settings"):
        launch.train(functools.partial(LineTask, 0.06, 0.1), rows(32), None, first)


@pytest.mark.ray
def test_training_refuses_strings_too_few_rows_and_plateau_without_validation(ray_session, fit):
    strings = ray.data.from_items([{"pair_id": f"{i}", "key": i} for i in range(8)])
    with pytest.raises(ValueError, match="pair_id"):
        launch.train(LINE, strings, None, fit)
    with pytest.raises(ValueError, match="got 1 in all"):
        launch.train(LINE, rows(1), None, fit)
    with pytest.raises(ValueError, match="plateau"):
        launch.train(LINE, rows(8), None, dataclasses.replace(fit, schedule="plateau"))


@pytest.mark.ray
def test_training_logs_epochs_and_a_loss_curve_and_tells_listeners(ray_session, fit):
    listener = Listener()
    with tracking.start("line", Settings(fit)) as run, launch.report_to(listener):
        launch.train(LINE, rows(64), rows(8), fit, run)
        launch.train(LINE, rows(64), None, fit)  # without a run, nobody is told
    assert listener.seen == [1, 2, 3]
    assert [step for step, _ in run.history("val/loss")] == [1, 2, 3]
    curve = run.history("step/loss")
    assert [step for step, _ in curve] == list(range(1, 25))
    losses = [loss for step, loss in curve if step <= 8]
    assert run.history("train/loss")[0][1] == pytest.approx(np.mean(losses))


KILLED = """
import functools, sys
import ray
from tests.helpers.stage import LineTask, rows
from cvmatch import config
from cvmatch.runtime import session
from cvmatch.training import launch
from cvmatch.training.settings import TrainConfig

session.start()  # joins the Ray of the tests
fit = config.parse(TrainConfig, sys.argv[1:])
launch.train(functools.partial(LineTask, 0.05, 0.1, 0.2, 0.05), rows(32), rows(8), fit)
"""


def entries(book):
    return json.loads(book.read_text())["epochs"] if book.exists() else []


@pytest.mark.ray
@pytest.mark.slow
def test_killed_run_goes_on_and_ends_as_the_undisturbed_one(ray_session, fit, tmp_path):
    killed = rename_run(fit, "killed", epochs=12)
    (tmp_path / "fit.yaml").write_text(configs.dump(killed))
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, "killed.py", "--config", "fit.yaml"]
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": address})
    book = tmp_path / "runs" / "killed" / checkpoints.LEDGER
    until = time.monotonic() + 240
    while len(entries(book)) < 3 and time.monotonic() < until:
        assert process.poll() is None, "the training ended by itself"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(entries(book))
    assert 3 <= done < 12
    changed = os.stat(book.parent / checkpoints.name_of(done) / checkpoints.STATE).st_mtime_ns

    build = functools.partial(LineTask, 0.05, 0.1, 0.2, 0.05)
    resumed = launch.train(build, rows(32), rows(8), killed)
    straight = launch.train(build, rows(32), rows(8), rename_run(fit, "straight", epochs=12))
    assert resumed.metrics == straight.metrics
    assert entries(book)[:done] == straight.history.to_dict("records")[:done]
    kept = book.parent / checkpoints.name_of(done) / checkpoints.STATE
    assert not kept.exists() or kept.stat().st_mtime_ns == changed  # was not trained again


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_train_as_one_with_the_same_batch(ray_session, fit, tmp_path):
    # Batches of all rows, so that the order does not matter; gradients are averaged by gloo.
    whole = dataclasses.replace(fit, batch=64, epochs=4, warmup=0.0)
    build = functools.partial(LineTask, 0.3, 0.1)
    data, val = rows(64).materialize(), rows(13, seed=1, block=4).materialize()
    with tracking.start("line", Settings(fit)) as run:
        two = launch.train(build, data, val, rename_run(whole, "two", workers=2), run)
    one = launch.train(build, data, val, rename_run(whole, "one"))
    assert two.history["epoch"].tolist() == [1, 2, 3, 4]
    for name in one.metrics:
        if "lr" not in name and name != "train/workers":
            expected = one.history[name].tolist()
            assert two.history[name].tolist() == pytest.approx(expected, rel=1e-5), name
    assert two.metrics["val/loss"] < 0.9 * two.history["val/loss"].iloc[0]
    weights = [load_file(f"{r.checkpoint}/model/line.safetensors") for r in (one, two)]
    torch.testing.assert_close(weights[0]["line.weight"], weights[1]["line.weight"])
    assert [step for step, _ in run.history("val/loss")] == [1, 2, 3, 4]
    assert len(run.history("step/loss")) == 4
    assert os.listdir(launch.publish(two, str(tmp_path / "out"))) == ["line.safetensors"]


@pytest.mark.ray
@pytest.mark.slow
def test_worker_that_dies_is_started_again_and_repeats_the_local_run(ray_session, fit, tmp_path):
    bomb = tmp_path / "bomb"
    bomb.touch()
    build = functools.partial(LineTask, 0.05, 0.1, 0.2, 0.0, str(bomb))
    data, val = rows(30), rows(13, seed=1)
    died = launch.train(build, data, val, rename_run(fit, "died", workers=1, max_failures=1))
    assert not bomb.exists()
    local = launch.train(build, data, val, rename_run(fit, "local"))
    assert died.metrics == local.metrics
    assert died.history["epoch"].tolist() == [1, 2, 3]


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_are_refused_before_the_start(ray_session, fit):
    many = dataclasses.replace(fit, workers=8)
    with pytest.raises(ValueError, match="need 9 CPUs, the cluster has 8"):
        launch.train(LINE, rows(32), None, many)
