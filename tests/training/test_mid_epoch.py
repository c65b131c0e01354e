"""Runs that stop in the midst of an epoch: no row is lost, none is used twice."""

import dataclasses
import functools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from cvmatch.data import storage
from cvmatch.training import launch, mid_epoch
from tests.helpers.stage import LineTask, rename_run, rows


class NotedTask(LineTask):
    """Notes the keys of each step, and fails in the second epoch's fourth one, once."""

    def __init__(self, notes: str, bomb: str, lr: float = 0.0) -> None:
        super().__init__(lr, noise=0.1)
        self.notes, self.bomb, self.steps = notes, "", 0
        self.fuse = bomb

    def forward(self, batch):
        if self.training and int(batch["epoch"]) == 1:
            self.steps += 1
            if self.steps == 4 and os.path.exists(self.fuse):
                time.sleep(1)  # what is on its way arrives
                os.remove(self.fuse)
                raise RuntimeError("the machine is gone")
            with open(self.notes, "ab") as file:
                file.write(batch["key"].cpu().numpy().tobytes())
        return super().forward(batch)


def noted(path: Path) -> list[int]:
    return np.frombuffer(path.read_bytes(), np.int64).tolist()


def often(fit, **changes):
    """Write a checkpoint after each step."""
    return dataclasses.replace(fit, checkpoint_minutes=1e-9, epochs=2, **changes)


def stop(tmp_path, fit, data):
    """Let a run fail in the midst of its second epoch; return its task, and what it had used."""
    (tmp_path / "bomb").touch()
    build = functools.partial(NotedTask, str(tmp_path / "keys"), str(tmp_path / "bomb"))
    with pytest.raises(RuntimeError, match="the machine is gone"):
        launch.train(build, data, None, fit)
    run = storage.join(fit.storage, fit.name)
    found = mid_epoch.find(run)
    assert found is not None
    assert found["epoch"] == 1
    return build, mid_epoch.read_seen(run, found).tolist()


@pytest.mark.ray
@pytest.mark.parametrize("accumulate", [1, 2])
def test_run_goes_on_with_the_rows_that_are_left(ray_session, fit, tmp_path, accumulate):
    data = rows(32)
    begun = rename_run(often(fit), "begun", accumulate=accumulate)
    build, used = stop(tmp_path, begun, data)
    assert len(used) in (8, 16, 24)
    before = len(noted(tmp_path / "keys"))

    result = launch.train(build, data, None, begun)
    rest = noted(tmp_path / "keys")[before:]
    everything = [row["key"] for row in data.take_all()]
    assert sorted(used + rest) == sorted(everything)
    straight = launch.train(build, data, None, rename_run(begun, "straight"))
    # Nothing is learnt, so the mean of an epoch is that of its rows, whenever they were used.
    assert result.metrics["train/loss"] == pytest.approx(straight.metrics["train/loss"], rel=1e-6)
    assert mid_epoch.find(result.path) is None


@pytest.mark.ray
def test_run_that_never_stops_is_the_same_with_such_checkpoints(ray_session, fit, tmp_path):
    build = functools.partial(LineTask, 0.1, 0.1, 0.2)
    ends = [
        launch.train(build, rows(32), None, rename_run(some, name)).history
        for name, some in (("with", often(fit)), ("without", dataclasses.replace(fit, epochs=2)))
    ]
    assert ends[0].equals(ends[1])


@pytest.mark.ray
@pytest.mark.slow
def test_run_goes_on_with_fewer_workers(ray_session, fit, tmp_path):
    data = rows(32)
    two = rename_run(often(fit), "fewer", workers=2, max_failures=0)
    (tmp_path / "bomb").touch()
    build = functools.partial(NotedTask, str(tmp_path / "keys"), str(tmp_path / "bomb"))
    with pytest.raises(Exception, match="the machine is gone"):
        launch.train(build, data, None, two)
    found = mid_epoch.find(storage.join(two.storage, "fewer"))
    assert found is not None
    used = mid_epoch.read_seen(storage.join(two.storage, "fewer"), found).tolist()
    before = len(noted(tmp_path / "keys"))
    launch.train(build, data, None, dataclasses.replace(two, workers=1))
    rest = noted(tmp_path / "keys")[before:]
    assert sorted(used + rest) == sorted(row["key"] for row in data.take_all())
