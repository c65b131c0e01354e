"""Steps, schedules, validation and what a checkpoint holds of one worker."""

import dataclasses
import functools
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cvmatch.nn import rng
from cvmatch.training import launch, loop
from cvmatch.training.settings import TrainConfig
from tests.helpers.stage import LINE, LineTask, rename_run, rows


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


def test_parameter_groups_name_the_weight_that_no_group_has():
    task = LineTask(0.1)
    groups = loop.parameter_groups(task, task)
    assert [len(group["params"]) for group in groups] == [1, 1]  # the frozen scale is left out
    task.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        loop.parameter_groups(task, task)


@pytest.mark.ray
def test_training_validates_all_rows_at_epoch_zero_with_a_partial_batch(ray_session, fit):
    metrics = launch.train(LINE, rows(19), rows(13, seed=1), fit).metrics
    data = rows(13, seed=1).take_batch(13)
    result = launch.train(LINE, rows(19), rows(13, seed=1), rename_run(fit, "again"))
    weights = load_file(f"{result.checkpoint}/model/line.safetensors")
    x, y = torch.tensor(data["x"]), torch.tensor(data["y"])
    error = (x @ weights["line.weight"][0] + weights["line.bias"] - y).square().mean().item()
    assert metrics["val/loss"] == pytest.approx(error, rel=1e-5)
    assert metrics["val/epoch"] == 0
    assert metrics["val/signs"] == pytest.approx(1)
    assert metrics["lr"] == pytest.approx(10 * metrics["lr/1"])


@pytest.mark.ray
def test_training_returns_its_best_epoch_by_a_metric_that_is_there(ray_session, fit):
    best = rename_run(fit, "best", epochs=4, best="val/loss")
    result = launch.train(LINE, rows(19), rows(13, seed=1), best)
    losses = result.history["val/loss"]
    assert result.metrics["epoch"] == result.history.loc[losses.idxmin(), "epoch"]
    unknown = rename_run(fit, "unknown", epochs=3, best="val/nothing")
    with pytest.raises(ValueError, match="val/nothing"):
        launch.train(LINE, rows(19), rows(13, seed=1), unknown)


@pytest.mark.ray
def test_training_with_one_seed_repeats_itself_and_with_another_does_not(ray_session, fit):
    build = functools.partial(LineTask, 0.05, 0.1, 0.3)
    first, second = (launch.train(build, rows(32), None, fit).metrics for _ in range(2))
    assert first == second
    other = launch.train(build, rows(32), None, dataclasses.replace(fit, seed=1)).metrics
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
    losses = [launch.train(build, rows(32), rows(8), f).metrics["val/loss"] for f in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.ray
def test_plateau_lowers_the_rate_when_the_validation_loss_stalls(ray_session, fit):
    slow = dataclasses.replace(fit, epochs=6, schedule="plateau")
    build = functools.partial(LineTask, 1e-12)  # learns nothing, so its loss stalls at once
    rate = launch.train(build, rows(16), rows(8), slow).history["lr"]
    assert rate.iloc[0] == 1e-12
    assert rate.iloc[-1] == pytest.approx(1e-13)


@pytest.mark.ray
def test_state_leaves_frozen_weights_out_and_loads_without_pickle(ray_session, fit):
    result = launch.train(LINE, rows(16), None, fit)
    state = torch.load(f"{result.checkpoint}/state.pt", weights_only=True)
    assert sorted(state["model"]) == ["line.bias", "line.weight", "seen"]
    assert state["epoch"] == 3


@pytest.mark.ray
def test_training_whose_loss_is_not_finite_stops_before_a_checkpoint(ray_session, fit):
    build = functools.partial(LineTask, 1e30)
    wild = rename_run(fit, "wild", clip_norm=0.0, warmup=0.0)
    with pytest.raises(FloatingPointError, match="learning rates"):
        launch.train(build, rows(64), None, wild)
    assert not os.path.exists(f"{fit.storage}/wild/epoch_0001")
