"""The page of a search, and what it says of the importance of settings."""

import random
from pathlib import Path

import pytest

from cvmatch.tune import importance
from cvmatch.tune.page import write_tune_page
from cvmatch.tune.settings import Tune
from cvmatch.tune.trials import TrialSummary
from tests.report.test_page import Document

SPACE = {
    "loss": {"choice": ["triplet", "infonce"]},
    "margin": {"uniform": [0.05, 0.6], "when": {"loss": ["triplet"]}},
    "lr_heads": {"loguniform": [1e-4, 1e-2]},
    "lr_towers": {"uniform": [0.0, 1.0]},
}


def draw(count):
    """Trials whose value is that of lr_towers alone, the last one failed."""
    lot = random.Random(0)
    trials: list[TrialSummary] = []
    for number in range(count):
        loss = lot.choice(["triplet", "infonce"])
        params = {"loss": loss, "lr_heads": lot.uniform(1e-4, 1e-2), "lr_towers": lot.random()}
        params |= {"margin": lot.uniform(0.05, 0.6)} if loss == "triplet" else {}
        stopped = number % 3 == 1
        trials.append(
            {
                "trial": f"t{number}",
                "params": params,
                "metrics": {"epoch": 1 if stopped else 4, "val/mrr": params["lr_towers"]},
                "error": "",
                "state": "stopped early" if stopped else "finished",
                "history": [[epoch, 0.5] for epoch in range(1, 2 if stopped else 5)],
                "seconds": 1800.0,
            }
        )
    failed = trials[-1].copy()
    failed["metrics"], failed["history"], failed["state"] = {}, [], "failed"
    return [*trials[:-1], failed]


@pytest.mark.parametrize("count", [2, 24])
def test_page_shows_every_trial_and_how_to_train_the_best(tmp_path, count):
    trials = draw(count)
    config = Tune(output=str(tmp_path))
    page = Document(Path(write_tune_page(config, SPACE, trials, "lr_heads: 0.1\n")).read_text())
    words = " ".join(" ".join(page.texts).split())
    assert f"cvmatch train-matcher --config {tmp_path}/best.yaml" in words
    assert words.count("stopped early") >= sum(t["state"] == "stopped early" for t in trials)
    assert f"{count / 2:.2f}" in words  # hours
    assert not page.attributes("script", "src")
    assert "http" not in "".join(page.attributes("img", "src") + page.attributes("link", "href"))
    charts = page.attributes("svg", "aria-label")
    if count > 2:
        assert any("4 axes" in label or "5 axes" in label for label in charts)
        assert sum("val/mrr over" in label for label in charts) == 5  # runs, and each setting
        assert "lr_towers" in words.partition("What matters")[2]


def test_importance_names_the_setting_that_decides_with_an_interval():
    known = [(t["params"] or {}, t["metrics"]["val/mrr"]) for t in draw(61)[:-1]]
    found = importance.measure(known, SPACE, maximise=True)
    assert found[0].name == "lr_towers"
    assert found[0].share > 0.5
    assert {one.name for one in found} == set(SPACE)
    assert sum(one.share for one in found) == pytest.approx(1)
    assert all(0 <= one.low <= one.high <= 1 for one in found)
    assert found == importance.measure(known, SPACE, maximise=True)
    assert importance.measure(known[:3], SPACE, maximise=True) == []
