"""Which checkpoints a run keeps, and what its ledger says."""

import math
import os
from typing import Any

import pytest

from cvmatch.training import checkpoints


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


@pytest.mark.parametrize(
    ("metric", "best"),
    [("val/loss", 2), ("val/lpips", 2), ("val/miou", 4), ("val/recall_at_1", 4), ("val/mrr", 4)],
)
def test_epoch_whose_measure_is_nan_is_never_the_best(tmp_path, metric, best):
    directory = checkpoints.RunDirectory(location=str(tmp_path), best=metric, keep=1)
    for epoch, value in enumerate([math.nan, 0.5, 0.7, 0.9, math.nan], start=1):
        os.makedirs(directory.checkpoint(epoch).path)
        directory.add({"epoch": epoch, metric: value})
    assert directory.result().metrics["epoch"] == best
    directory.prune()
    left = [epoch for epoch in range(1, 6) if os.path.isdir(directory.checkpoint(epoch).path)]
    assert left == [best, 5]
