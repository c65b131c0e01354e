"""Means over rows, the loss curve, and batches as tensors."""

import json

import numpy as np
import pytest
import torch

from cvmatch.training import checkpoints, metrics


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


def test_kept_rows_with_keys_come_in_the_order_of_keys_and_once():
    parts = [([3, 1], [30.0, 10.0]), ([2, 3], [20.0, 31.0])]
    means = metrics.MeanMetrics()
    for keys, values in parts:
        kept = {"rows/key": torch.tensor(keys), "rows/score": torch.tensor(values)}
        means.add(kept, rows=len(keys))
    found = means.reduce(world=1)
    assert found["rows/key"].tolist() == [1, 2, 3]
    assert found["rows/score"].tolist() == [10.0, 20.0, 30.0]


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


def test_loss_curve_keeps_a_point_for_each_step_of_a_short_run(tmp_path):
    meter = metrics.LossCurve(str(tmp_path), steps=10, epochs=3, writes=True)
    for step in range(1, 31):
        meter.tick(step, torch.tensor(float(step)))
    assert meter.take() == [(step, float(step)) for step in range(1, 31)]
    progress = json.loads((tmp_path / checkpoints.PROGRESS).read_text())
    assert progress == {"step": 30, "steps": 30, "epoch": 3, "epochs": 3, "loss": 30.0}


def test_loss_curve_averages_between_the_points_of_a_long_run(tmp_path):
    meter = metrics.LossCurve(str(tmp_path), steps=1000, epochs=1, writes=True)
    for step in range(1, 1001):
        meter.tick(step, torch.tensor(float(step)))
    points = meter.take()
    assert len(points) == metrics.POINTS
    assert points[0] == (5, 3.0)  # the mean of 1 to 5
