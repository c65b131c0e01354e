import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch
from mlflow import MlflowClient
from ray.train import UserCallback
from safetensors.torch import load_file
from torch import nn

from cvmatch import config as configs
from cvmatch.data import images
from cvmatch.nn import rng
from cvmatch.runtime import tracking
from cvmatch.training import checkpoints, launch, loop, metrics
from cvmatch.training.settings import TrainConfig
from cvmatch.training.task import EpochOrder
from tests.helpers.stage import LineTask, rows

LINE = functools.partial(LineTask, 0.05, 0.1)


@dataclasses.dataclass(frozen=True)
class Settings:
    fit: TrainConfig


def trained(*arguments) -> Any:
    return launch.train(*arguments)


class Listener(UserCallback):
    def __init__(self):
        self.seen = []

    def after_report(self, run_context, metrics, checkpoint):
        self.seen.append(metrics[0]["epoch"])


@pytest.fixture
def fit(tmp_path):
    return TrainConfig(epochs=3, batch=8, storage=str(tmp_path / "runs"), shuffle=64)


def named(fit, name, **changes):
    return dataclasses.replace(fit, name=name, **changes)


# --- settings -------------------------------------------------------------------------------------


def test_fit_refuses_a_batch_that_workers_cannot_share():
    with pytest.raises(ValueError, match=r"3 workers can share evenly, got 8.*--fit.batch 9"):
        TrainConfig(batch=8, workers=3)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"keep": 0}, {"workers": -1}, {"warmup": 1.0}])
def test_fit_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match="fit: "):
        TrainConfig(**wrong)


def test_fit_reads_back_from_its_dump(tmp_path):
    before = TrainConfig(schedule="plateau", best="val/loss", clip_norm=0.5)
    (tmp_path / "fit.yaml").write_text(configs.dump(before))
    assert configs.parse(TrainConfig, ["--config", str(tmp_path / "fit.yaml")]) == before


def rates(fit, steps):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    schedule = loop.build_scheduler(optimizer, fit, steps)
    found = []
    for _ in range(math.ceil(steps / fit.accumulate) * fit.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()  # pyright: ignore[reportCallIssue]
    return found


def test_cosine_rises_over_the_warmup_and_falls_to_zero():
    found = rates(TrainConfig(epochs=10, warmup=0.2), steps=10)
    assert found[:20] == sorted(found[:20])
    assert max(found) == pytest.approx(1.0)
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[60] == pytest.approx(0.5)  # half way from 20 to 100
    assert found[-1] < 0.001


def test_constant_stays_after_the_warmup_and_accumulation_counts_moves():
    found = rates(TrainConfig(epochs=4, schedule="constant", warmup=0.25, accumulate=3), steps=7)
    assert len(found) == 12  # 7 steps make 3 moves an epoch
    assert found[3:] == [1.0] * 9


def test_trainable_names_the_weight_that_no_group_has():
    task = LineTask(0.1)
    groups = loop.parameter_groups(task, task)
    assert [len(group["params"]) for group in groups] == [1, 1]  # the frozen scale is left out
    task.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        loop.parameter_groups(task, task)


# --- means and batches ----------------------------------------------------------------------------


def test_means_weigh_batches_by_their_rows():
    means = metrics.MeanMetrics()
    means.add({"loss": torch.tensor(1.0), "table": torch.tensor([1.0, 0.0])}, rows=3)
    means.add({"loss": torch.tensor(5.0), "table": torch.tensor([0.0, 1.0])}, rows=1)
    found = means.reduce(world=1)
    assert found["loss"].item() == 2.0
    assert found["table"].tolist() == [0.75, 0.25]


def test_means_keep_the_rows_that_a_task_asks_to_keep():
    means = metrics.MeanMetrics()
    means.add({"loss": torch.tensor(1.0), "rows/score": torch.tensor([1.0, 2.0])}, rows=2)
    means.add({"loss": torch.tensor(4.0), "rows/score": torch.tensor([3.0])}, rows=1)
    means.add({"loss": torch.tensor(2.0)}, rows=1)  # a batch may keep none
    found = means.reduce(world=1)
    assert found["rows/score"].tolist() == [1.0, 2.0, 3.0]
    assert found["loss"].item() == 2.0


def test_means_of_no_rows_say_so():
    with pytest.raises(ValueError, match="no rows"):
        metrics.MeanMetrics().reduce(world=1)


def test_tensors_own_their_memory():
    batch = {"x": np.zeros((2, 3), np.float32)}
    metrics.to_tensors(batch)["x"].fill_(1)
    assert not batch["x"].any()


def test_tensors_of_strings_name_the_column():
    with pytest.raises(ValueError, match=r"pair_id.*rng\.row_key"):
        metrics.to_tensors({"pair_id": np.array(["0000001"]), "key": np.array([1])})


def test_meter_keeps_a_point_for_each_step_of_a_short_run(tmp_path):
    meter = metrics.LossCurve(str(tmp_path), steps=10, epochs=3, writes=True)
    for step in range(1, 31):
        meter.tick(step, torch.tensor(float(step)))
    assert meter.take() == [(step, float(step)) for step in range(1, 31)]
    progress = json.loads((tmp_path / checkpoints.PROGRESS).read_text())
    assert progress == {"step": 30, "steps": 30, "epoch": 3, "epochs": 3, "loss": 30.0}


def test_meter_averages_between_the_points_of_a_long_run(tmp_path):
    meter = metrics.LossCurve(str(tmp_path), steps=1000, epochs=1, writes=True)
    for step in range(1, 1001):
        meter.tick(step, torch.tensor(float(step)))
    points = meter.take()
    assert len(points) == metrics.POINTS
    assert points[0] == (5, 3.0)  # the mean of 1 to 5


# --- the run directory ----------------------------------------------------------------------------


def ledger(tmp_path, losses, **options) -> Any:
    directory = checkpoints.RunDirectory(location=str(tmp_path), keep=1, **options)
    for epoch, loss in enumerate(losses, start=1):
        (tmp_path / checkpoints.name_of(epoch)).mkdir()
        directory.add({"epoch": epoch, "val/loss": loss})
    return directory


def test_prune_keeps_the_best_and_the_latest(tmp_path):
    directory = ledger(tmp_path, [3.0, 1.0, 2.0, 4.0], best="val/loss")
    directory.prune()
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_0002", "epoch_0004"]
    result: Any = directory.result()
    assert result.metrics == {"epoch": 2, "val/loss": 1.0}
    assert result.checkpoint.endswith("epoch_0002")
    assert directory.latest() == 4


def test_result_without_a_criterion_is_the_last_epoch(tmp_path):
    assert ledger(tmp_path, [1.0, 3.0]).result().metrics["epoch"] == 2


def test_result_by_a_metric_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"val/miou.*val/loss"):
        ledger(tmp_path, [1.0], best="val/miou").result()


def test_epoch_whose_checkpoint_is_gone_does_not_count(tmp_path):
    directory = ledger(tmp_path, [1.0, 2.0])
    (tmp_path / "epoch_0002").rmdir()
    assert directory.latest() == 1


def test_epoch_that_is_repeated_replaces_itself_and_what_came_after(tmp_path):
    directory = ledger(tmp_path, [3.0, 2.0, 1.0])
    directory.add({"epoch": 2, "val/loss": 5.0})
    assert [entry["val/loss"] for entry in directory.entries()] == [3.0, 5.0]


def test_copy_tree_replaces_what_was_there(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for place, name in ((new, "a"), (old, "b")):
        (place / "deep").mkdir(parents=True)
        (place / "deep" / name).write_text(name)
    filesystem, path = checkpoints.storage.resolve(str(new))
    checkpoints.copy_tree(filesystem, path, str(old))
    assert sorted(p.name for p in old.rglob("*")) == ["a", "deep"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


# --- fit, in this process -------------------------------------------------------------------------


@pytest.mark.ray
def test_fit_learns_and_publishes_the_model(ray_session, fit, tmp_path):
    longer = dataclasses.replace(fit, epochs=12, cache=True, warmup=0.0)
    result = trained(functools.partial(LineTask, 0.5), rows(64), rows(13, seed=1), longer)
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
def test_fit_asks_for_its_order_with_the_model_as_it_is_and_keeps_it(ray_session, fit, tmp_path):
    asked = []

    def ordered(model: str, epoch: int):
        path = os.path.join(model, "line.safetensors")
        asked.append(load_file(path)["seen"].item() if model else epoch)
        return rows(16, seed=len(asked))

    def weights(name: str, shuffle: int):
        config = named(fit, name, epochs=5, shuffle=shuffle)
        result = trained(LINE, rows(99), None, config, None, EpochOrder(2, ordered))
        assert list(result.history["epoch"]) == [1, 2, 3, 4, 5]
        return load_file(f"{result.checkpoint}/model/line.safetensors")

    found = weights("ordered", shuffle=64)
    assert asked == [0, 32, 64]  # before epochs 1, 3 and 5, of 16 rows each
    asked.clear()
    assert torch.equal(found["line.weight"], weights("again", shuffle=0)["line.weight"])


@pytest.mark.ray
def test_fit_with_an_order_goes_on_from_where_it_stopped(ray_session, fit):
    whole, parts = ([], [])
    for asked, name, stops in ((whole, "whole", [5]), (parts, "parts", [3, 5])):
        for epochs in stops:
            config = named(fit, name, epochs=epochs, schedule="constant", warmup=0.0)
            order = EpochOrder(2, lambda model, epoch, asked=asked: asked.append(model) or rows(16))
            result = trained(LINE, rows(99), None, config, None, order)
        weights = load_file(f"{result.checkpoint}/model/line.safetensors")
        asked.append(weights["line.weight"])
    assert [bool(model) for model in parts[:-1]] == [False, True, True, True]  # 3: cut short
    assert torch.equal(whole[-1], parts[-1])


@pytest.mark.ray
def test_fit_of_rows_made_anew_at_their_place_is_another_run(ray_session, fit):
    run = named(fit, "rows", epochs=1)
    first = launch.train(LINE, rows(19), None, run, input_fingerprint="one")
    assert launch.train(LINE, rows(19), None, run, input_fingerprint="one").metrics == first.metrics
    with pytest.raises(ValueError, match="rows made from: 'one' before, now 'two'"):
        launch.train(LINE, rows(19), None, run, input_fingerprint="two")


@pytest.mark.parametrize("mode", ["min", "max"])
def test_epoch_whose_measure_is_nan_is_never_the_best(tmp_path, mode):
    directory = checkpoints.RunDirectory(location=str(tmp_path), keep=1, best="val/loss", mode=mode)
    for epoch, value in enumerate([math.nan, 0.5, 0.7, math.nan], start=1):
        os.makedirs(directory.checkpoint(epoch).path)
        directory.add({"epoch": epoch, "val/loss": value})
    best = 2 if mode == "min" else 3
    assert directory.result().metrics["epoch"] == best
    directory.prune()
    left = [epoch for epoch in range(1, 5) if os.path.isdir(directory.checkpoint(epoch).path)]
    assert left == [best, 4]


@pytest.mark.ray
def test_fit_validates_all_rows_at_epoch_zero_with_a_partial_batch(ray_session, fit):
    metrics = trained(LINE, rows(19), rows(13, seed=1), fit).metrics
    data = rows(13, seed=1).take_batch(13)
    result = trained(LINE, rows(19), rows(13, seed=1), named(fit, "again"))
    weights = load_file(f"{result.checkpoint}/model/line.safetensors")
    x, y = torch.tensor(data["x"]), torch.tensor(data["y"])
    error = (x @ weights["line.weight"][0] + weights["line.bias"] - y).square().mean().item()
    assert metrics["val/loss"] == pytest.approx(error, rel=1e-5)
    assert metrics["val/epoch"] == 0
    assert metrics["val/signs"] == pytest.approx(1)
    assert metrics["lr"] == pytest.approx(10 * metrics["lr/1"])


@pytest.mark.ray
def test_fit_validates_every_few_epochs_and_at_the_last(ray_session, fit):
    often = named(fit, "few", epochs=5, validate_every=2, best="val/loss", keep=1)
    result = trained(LINE, rows(19), rows(13, seed=1), often)
    entries = result.history
    assert entries["val/loss"].notna().tolist() == [False, True, False, True, True]
    best = entries.loc[entries["val/loss"].idxmin(), "epoch"]
    assert result.metrics["epoch"] == best  # never one that was not looked at
    unknown = named(fit, "unknown", epochs=5, validate_every=5, best="val/nothing", keep=1)
    with pytest.raises(ValueError, match="val/nothing"):
        launch.train(LINE, rows(19), rows(13, seed=1), unknown)
    with pytest.raises(ValueError, match="validate_every 2"):
        TrainConfig(schedule="plateau", validate_every=2)


class PictureTask(LineTask):
    """A line whose validation shows a picture."""

    def summary(self, means):
        return super().summary(means) | {"shade": np.full((2, 3, 3), 7, np.uint8)}


@pytest.mark.ray
def test_fit_keeps_the_pictures_of_a_validation_in_the_checkpoint_and_the_run(
    ray_session, fit, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    build = functools.partial(PictureTask, 0.05)
    with tracking.start("line", Settings(fit)) as run:
        result = launch.train(build, rows(19), rows(13, seed=1), named(fit, "shown"), run)
    with open(f"{result.checkpoint}/shade.png", "rb") as file:
        assert (images.decode(file.read()) == 7).all()
    client = MlflowClient(run.uri)
    kept = [file.path for file in client.list_artifacts(run.run_id, "shade")]
    assert kept == [f"shade/epoch_{epoch:04d}.png" for epoch in (1, 2, 3)]


@pytest.mark.ray
def test_fit_with_one_seed_repeats_itself_and_with_another_does_not(ray_session, fit):
    build = functools.partial(LineTask, 0.05, 0.1, 0.3)
    first, second = (trained(build, rows(32), None, fit).metrics for _ in range(2))
    assert first == second
    other = trained(build, rows(32), None, dataclasses.replace(fit, seed=1)).metrics
    assert other["train/loss"] != first["train/loss"]


@pytest.mark.ray
def test_each_epoch_trains_on_all_rows_in_an_order_of_its_own(ray_session, fit):
    seen: dict[int, list[int]] = {}

    class Watched(LineTask):
        def forward(self, batch):
            if self.training:
                seen.setdefault(int(batch["epoch"]), []).extend(batch["key"].tolist())
            return super().forward(batch)

    stored = [rng.row_key(f"0/{index}") for index in range(32)]
    launch.train(lambda: Watched(0.05), rows(32), None, fit)
    assert [sorted(keys) for keys in seen.values()] == [sorted(stored)] * 3
    assert seen[0] != stored
    assert seen[1] not in (stored, seen[0])


@pytest.mark.ray
def test_accumulated_steps_move_as_one_step_of_their_rows(ray_session, fit):
    build = functools.partial(LineTask, 0.05)
    whole = dataclasses.replace(fit, batch=16, shuffle=0, clip_norm=0.0)
    parts = dataclasses.replace(whole, batch=4, accumulate=4)
    losses = [trained(build, rows(32), rows(8), f).metrics["val/loss"] for f in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.ray
def test_plateau_lowers_the_rate_when_the_validation_loss_stalls(ray_session, fit):
    slow = dataclasses.replace(fit, epochs=4, schedule="plateau", patience=1)
    build = functools.partial(LineTask, 1e-12)  # learns nothing, so its loss stalls at once
    rate = trained(build, rows(16), rows(8), slow).history["lr"]
    assert rate.iloc[0] == 1e-12
    assert rate.iloc[-1] == pytest.approx(1e-13)


@pytest.mark.ray
def test_finished_run_again_gives_its_result_without_an_epoch(ray_session, fit):
    once = named(fit, "line")
    before = trained(LINE, rows(32), rows(8), once)
    changed = os.stat(f"{before.path}/epoch_0003/state.pt").st_mtime_ns
    again = trained(LINE, rows(32), rows(8), once)
    assert again.metrics == before.metrics
    assert again.checkpoint == before.checkpoint
    assert os.stat(f"{before.path}/epoch_0003/state.pt").st_mtime_ns == changed


@pytest.mark.ray
def test_run_with_more_epochs_goes_on_and_with_other_settings_is_refused(ray_session, fit):
    first = named(fit, "line", schedule="constant", warmup=0.0)
    trained(LINE, rows(32), None, first)
    longer = trained(LINE, rows(32), None, dataclasses.replace(first, epochs=5))
    straight = dataclasses.replace(first, name="straight", epochs=5)
    assert trained(LINE, rows(32), None, straight).metrics == longer.metrics
    with pytest.raises(ValueError, match=r"fit.batch: 8 before, now 4.*--fit.name"):
        trained(LINE, rows(32), None, dataclasses.replace(first, batch=4))
    with pytest.raises(ValueError, match="other settings"):
        trained(functools.partial(LineTask, 0.06, 0.1), rows(32), None, first)


@pytest.mark.ray
def test_state_leaves_frozen_weights_out_and_loads_without_pickle(ray_session, fit):
    result = trained(LINE, rows(16), None, fit)
    state = torch.load(f"{result.checkpoint}/state.pt", weights_only=True)
    assert sorted(state["model"]) == ["line.bias", "line.weight", "seen"]
    assert state["epoch"] == 3


@pytest.mark.ray
def test_fit_refuses_strings_too_few_rows_and_plateau_without_validation(ray_session, fit):
    strings = ray.data.from_items([{"pair_id": f"{i}", "key": i} for i in range(8)])
    with pytest.raises(ValueError, match="pair_id"):
        trained(LINE, strings, None, fit)
    with pytest.raises(ValueError, match="got 1 in all"):
        trained(LINE, rows(1), None, fit)
    with pytest.raises(ValueError, match="plateau"):
        trained(LINE, rows(8), None, dataclasses.replace(fit, schedule="plateau"))


@pytest.mark.ray
def test_fit_whose_loss_is_not_finite_stops_before_a_checkpoint(ray_session, fit):
    build = functools.partial(LineTask, 1e30)
    wild = named(fit, "wild", clip_norm=0.0, warmup=0.0)
    with pytest.raises(FloatingPointError, match="learning rates"):
        trained(build, rows(64), None, wild)
    assert not os.path.exists(f"{fit.storage}/wild/epoch_0001")


@pytest.mark.ray
def test_fit_logs_epochs_and_a_loss_curve_and_tells_listeners(ray_session, fit):
    listener = Listener()
    with tracking.start("line", Settings(fit)) as run, launch.report_to(listener):
        trained(LINE, rows(64), rows(8), fit, run)
        trained(LINE, rows(64), None, fit)  # without a run, nobody is told
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
    killed = named(fit, "killed", epochs=12)
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
    resumed = trained(build, rows(32), rows(8), killed)
    straight = trained(build, rows(32), rows(8), named(fit, "straight", epochs=12))
    assert resumed.metrics == straight.metrics
    assert entries(book)[:done] == straight.history.to_dict("records")[:done]
    kept = book.parent / checkpoints.name_of(done) / checkpoints.STATE
    assert not kept.exists() or kept.stat().st_mtime_ns == changed  # was not trained again


# --- fit, in Ray Train's workers (30 s to start) --------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_train_as_one_with_the_same_batch(ray_session, fit, tmp_path):
    # Batches of all rows, so that the order does not matter; gradients are averaged by gloo.
    whole = dataclasses.replace(fit, batch=64, epochs=4, warmup=0.0)
    build = functools.partial(LineTask, 0.3, 0.1)
    data, val = rows(64).materialize(), rows(13, seed=1, block=4).materialize()
    with tracking.start("line", Settings(fit)) as run:
        two = trained(build, data, val, named(whole, "two", workers=2), run)
    one = trained(build, data, val, named(whole, "one"))
    assert two.history["epoch"].tolist() == [1, 2, 3, 4]
    for name in one.metrics:
        if "lr" not in name:
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
    died = trained(build, data, val, named(fit, "died", workers=1, max_failures=1))
    assert not bomb.exists()
    local = trained(build, data, val, named(fit, "local"))
    assert died.metrics == local.metrics
    assert died.history["epoch"].tolist() == [1, 2, 3]


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_are_refused_before_the_start(ray_session, fit):
    many = dataclasses.replace(fit, workers=8)
    with pytest.raises(ValueError, match="need 9 CPUs, the cluster has 8"):
        trained(LINE, rows(32), None, many)
