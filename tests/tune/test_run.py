import dataclasses
import json

import pytest
import yaml
from mlflow import MlflowClient

from cvmatch import config as configs
from cvmatch.data.settings import Validation
from cvmatch.generate.settings import TrainGenerator
from cvmatch.runtime import tracking
from cvmatch.training.settings import TrainConfig
from cvmatch.tune import run as tune
from cvmatch.tune import search_space
from cvmatch.tune.settings import Tune
from tests.helpers import stage as tiny_stage
from tests.helpers.present import present
from tests.helpers.stage import TrainLine

SPACE = {"lr": {"loguniform": [0.01, 0.5]}, "fit.clip_norm": {"choice": [0.0, 10.0]}}


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"concurrent": 0}, {"epochs": 2, "grace": 3}])
def test_tune_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match="tune: expected"):
        Tune(**wrong)


def test_check_names_the_field_that_the_stage_does_not_have():
    with pytest.raises(ValueError, match=r"no field 'lrr'.*'lr'"):
        search_space.check_space(TrainLine(), {"lrr": {"uniform": [0.1, 0.2]}})


def test_check_tries_both_ends_of_a_range():
    search_space.check_space(TrainLine(), {"lr": {"uniform": [0.1, 100.0]}})
    with pytest.raises(ValueError, match="at most 100, got 101"):
        search_space.check_space(TrainLine(), {"lr": {"uniform": [0.1, 101.0]}})


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"normal": [0, 1]}, "expected one of"),
        ({"uniform": [0.2, 0.1]}, r"\[low, high\]"),
        ({"uniform": [0.1]}, r"\[low, high\]"),
        (0.3, "expected one of"),
    ],
)
def test_check_refuses_what_is_no_draw(draw, message):
    with pytest.raises(ValueError, match=message):
        search_space.check_space(TrainLine(), {"lr": draw})


@pytest.mark.parametrize("stage", list(search_space.STAGES))
def test_default_spaces_name_fields_of_their_stages(stage):
    search_space.check_space(search_space.load_settings(stage), search_space.load_space(stage))


def test_load_takes_a_file_in_place_of_the_default(tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    assert search_space.load_space("matcher", str(tmp_path / "space.yaml")) == SPACE


def test_search_by_a_validation_metric_needs_validation_rows(tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    with pytest.raises(ValueError, match="--val"):
        tune.search(Tune(space=str(tmp_path / "space.yaml")), TrainLine(val=0))


def test_generator_search_by_sampled_pictures_needs_some(tmp_path):
    base = TrainGenerator(val=Validation(root="data/world"), validation_images=0)
    with pytest.raises(ValueError, match=r"retrieval_mrr.* validation_images 0.*--metric val/loss"):
        tune.search(Tune(stage="generator", storage=str(tmp_path)), base)


@pytest.mark.parametrize("stage", list(search_space.STAGES))
def test_trials_are_compared_by_what_the_space_does_not_move(stage):
    ((metric, mode),) = Tune(stage=stage).goals
    # A loss would: the least margin or weight has the least.
    assert "loss" not in metric
    assert mode == "max"


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val/loss", "min"), ("seconds", "min"), ("val/miou", "max"), ("val/recall_at_1", "max")],
)
def test_scores_are_good_when_large_and_all_else_when_small(metric, mode):
    assert Tune(metric=(metric,)).goals == [(metric, mode)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": ("val/mrr", "seconds")}, "--scheduler none"),
        (
            {"metric": ("val/mrr", "seconds"), "scheduler": "none", "sampler": "cmaes"},
            "--sampler tpe",
        ),
        ({"test": "unseen.yaml"}, "at least 1 of them with --test"),
        ({"repeats": -1}, "repeats >= 0"),
        ({"finalists": 0}, "finalists >= 1"),
    ],
)
def test_tune_refuses_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        Tune(**changes)


def test_rows_of_the_test_are_others_than_those_of_the_search(tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    (tmp_path / "test.yaml").write_text("val: 8\n")
    config = Tune(space=str(tmp_path / "space.yaml"), repeats=1, test=str(tmp_path / "test.yaml"))
    with pytest.raises(ValueError, match=r"test\.yaml to name rows by `val`.*got 8"):
        tune.search(config, TrainLine(val=8))


def test_rows_of_the_test_of_another_name_are_the_same_rows(tmp_path):
    (tmp_path / "test.yaml").write_text("val: {root: data/world/, limit: 3}\n")
    base = TrainGenerator(val=Validation(root="data/world"))
    config = Tune(stage="generator", repeats=1, test=str(tmp_path / "test.yaml"))
    with pytest.raises(ValueError, match="others than the search is judged by"):
        tune.search(config, base)


def test_seeds_cannot_be_searched_and_repeated(tmp_path):
    (tmp_path / "space.yaml").write_text("fit.seed: {choice: [1, 2]}\n")
    config = Tune(space=str(tmp_path / "space.yaml"), repeats=1)
    with pytest.raises(ValueError, match=r"fit\.seed is searched"):
        tune.search(config, TrainLine())


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    config = Tune(
        space=str(tmp_path / "space.yaml"),
        trials=4,
        concurrent=2,
        epochs=4,
        metric=("val/loss",),
        storage=str(tmp_path / "runs"),
        name="search",
        output=str(tmp_path / "tuned"),
    )
    fit = TrainConfig(batch=8, warmup=0.0, schedule="constant", shuffle=0)
    return config, TrainLine(fit=fit, log=str(tmp_path / "calls"))


@pytest.mark.ray
def test_search_that_the_cluster_cannot_hold_is_refused(ray_session, settings):
    config, base = settings
    with pytest.raises(ValueError, match="need 9 CPUs, the cluster has 8"):
        tune.search(dataclasses.replace(config, concurrent=8), base)


@pytest.mark.ray
def test_search_over_workers_without_the_dashboard_is_refused(ray_session, settings):
    config, base = settings
    base = configs.override(base, {"fit.workers": 2})
    with pytest.raises(ValueError, match="never frees the CPUs"):
        tune.search(config, base, tiny_stage.CODE)


@pytest.mark.ray
@pytest.mark.slow
def test_search_finds_the_best_trial_and_again_runs_none(ray_session, settings, tmp_path):
    config, base = settings
    result = tune.search(config, base, tiny_stage.CODE)
    assert len(result.trials) == 4
    scores = {t["metrics"]["val/loss"]: t["params"] for t in result.trials}
    assert result.value == min(scores)
    assert result.params == scores[min(scores)]
    assert all(0.01 <= present(t["params"])["lr"] <= 0.5 for t in result.trials)
    assert not any(t["error"] for t in result.trials)
    epochs = sorted(t["metrics"]["epoch"] for t in result.trials)
    assert epochs[-1] == 4
    assert epochs[0] < 4  # ASHA stopped some

    best = configs.parse(TrainLine, ["--config", str(tmp_path / "tuned" / "best.yaml")])
    changes = {**result.params, "fit.epochs": 4, "fit.name": ""}
    assert best == configs.override(base, changes)
    assert json.loads((tmp_path / "tuned" / "trials.json").read_text()) == result.trials

    # A trial's metrics are those of an ordinary training with its settings.
    whole = next(t for t in result.trials if t["metrics"]["epoch"] == 4)
    changes = {"fit.epochs": 4, "output": str(tmp_path / "line"), "fit.storage": str(tmp_path)}
    alone = tiny_stage.train(configs.override(base, {**present(whole["params"]), **changes}))
    assert alone.metrics == whole["metrics"]
    calls = (tmp_path / "calls").read_text().split()
    client = MlflowClient(tracking.tracking_uri())
    found = client.search_experiments(filter_string="name = 'cvmatch'")
    runs = client.search_runs([found[0].experiment_id], "tags.stage = 'tune'", max_results=1)
    children = f"tags.`{tracking.PARENT}` = '{runs[0].info.run_id}'"
    trained = client.search_runs([found[0].experiment_id], children)
    expected = {
        f"search-{trial['trial']}": "FINISHED" if trial["metrics"]["epoch"] == 4 else "KILLED"
        for trial in result.trials
    }
    assert {run.info.run_name: run.info.status for run in trained} == expected
    states = {trial["state"] for trial in result.trials}
    assert states == {"finished", "stopped early"}

    again = tune.search(config, base, tiny_stage.CODE)
    assert again.params == result.params
    assert (tmp_path / "calls").read_text().split() == calls
    with pytest.raises(ValueError, match=r"other settings.*seed"):
        tune.search(dataclasses.replace(config, seed=1), base, tiny_stage.CODE)


@pytest.mark.ray
@pytest.mark.slow
def test_winner_is_the_best_by_the_mean_of_other_seeds_and_measured_on_unseen_rows(
    ray_session, settings, tmp_path
):
    config, base = settings
    (tmp_path / "unseen.yaml").write_text("val: 24\n")
    config = dataclasses.replace(
        config, trials=3, epochs=2, scheduler="none", repeats=2, finalists=2
    )
    searched = tune.search(config, base, tiny_stage.CODE)
    calls = (tmp_path / "calls").read_text().split()
    assert len(calls) == 3 + 3 * 2  # defaults and two finalists, with two seeds each

    values = {one["trial"]: one["values"] for one in searched.repeated}
    means = {name: sum(of) / 2 for name, of in values.items()}
    assert searched.value == min(means.values())
    assert set(means) >= {"defaults"}
    assert len(means) == 3
    best = configs.parse(TrainLine, ["--config", str(tmp_path / "tuned" / "best.yaml")])
    expected = {**searched.params, "fit.epochs": 2, "fit.name": ""}
    assert best == configs.override(base, expected)
    assert json.loads((tmp_path / "tuned" / "repeats.json").read_text()) == searched.repeated

    # More is asked for afterwards: the search itself is not run again, the same repeats neither.
    config = dataclasses.replace(config, test=str(tmp_path / "unseen.yaml"))
    tested = tune.search(config, base, tiny_stage.CODE)
    assert len((tmp_path / "calls").read_text().split()) == len(calls) + 3 * 2
    assert {one["trial"]: one["values"] for one in tested.repeated} == values
    for one in tested.repeated:
        for seed, value in enumerate(one["test"]):
            changes = {**one["params"], "fit.seed": seed + 1, "fit.epochs": 2, "val": 24}
            changes |= {"output": str(tmp_path / "line"), "fit.storage": str(tmp_path / "alone")}
            alone = tiny_stage.train(configs.override(base, changes))
            assert value == pytest.approx(alone.metrics["val/loss"], rel=1e-6)
    assert "that the search never saw" in (tmp_path / "tuned" / "tune.html").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_several_metrics_end_in_a_front_of_settings(ray_session, settings, tmp_path):
    config, base = settings
    config = dataclasses.replace(
        config, metric=("val/loss", "seconds"), scheduler="none", epochs=2, trials=4
    )
    result = tune.search(config, base, tiny_stage.CODE)
    points = [(one["metrics"]["val/loss"], present(one["seconds"])) for one in result.trials]
    front = [
        one
        for one, (loss, seconds) in zip(result.trials, points, strict=True)
        if not any(a <= loss and b <= seconds and (a, b) != (loss, seconds) for a, b in points)
    ]
    assert sorted(one["trial"] for one in result.front) == sorted(one["trial"] for one in front)
    assert result.value == min(loss for loss, _ in points)
    files = sorted((tmp_path / "tuned" / "front").iterdir())
    assert len(files) == len(front)
    first = configs.parse(TrainLine, ["--config", str(files[0])])
    assert first == configs.parse(TrainLine, ["--config", str(tmp_path / "tuned" / "best.yaml")])
