"""What is proposed: conditional fields, grids, settings that are tried first, and who stops."""

import json

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule

from cvmatch.match.settings import TrainMatcher
from cvmatch.tune import proposals, search_space
from cvmatch.tune.settings import Scheduler, Tune

SPACE = {
    "loss": {"choice": ["triplet", "infonce"]},
    "margin": {"uniform": [0.05, 0.6], "when": {"loss": ["triplet"]}},
    "lr_heads": {"loguniform": [1e-4, 1e-2]},
}
GRID = {
    "loss": {"choice": ["triplet", "infonce"]},
    "margin": {"choice": [0.1, 0.3], "when": {"loss": "triplet"}},
    "fit.batch": {"choice": [8, 16]},
}


def propose(config, space=SPACE, count=8, base=None):
    first = proposals.list_first(config, base or TrainMatcher(), space)
    search = proposals.build_search(config, space, first)
    found = []
    for number in range(count):
        params = search.suggest(str(number))
        search.on_trial_complete(str(number), {config.goal[0]: number / count})
        found.append(params)
    return found


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random"])
def test_proposals_are_within_the_space_and_a_margin_is_there_for_triplets_alone(sampler):
    found = propose(Tune(sampler=sampler), count=20)
    assert {params["loss"] for params in found} == {"triplet", "infonce"}
    for params in found:
        assert ("margin" in params) == (params["loss"] == "triplet")
        assert 1e-4 <= params["lr_heads"] <= 1e-2
        assert 0.05 <= params.get("margin", 0.3) <= 0.6
    assert found == propose(Tune(sampler=sampler), count=20)
    assert found != propose(Tune(sampler=sampler, seed=1), count=20)


def test_grid_proposes_every_combination_once():
    config = Tune(sampler="grid", trials=1)
    found = propose(config, GRID, count=6)
    assert len({json.dumps(params, sort_keys=True) for params in found}) == 6
    triplets = [params for params in found if params["loss"] == "triplet"]
    assert sorted((p["margin"], p["fit.batch"]) for p in triplets) == [
        (0.1, 8), (0.1, 16), (0.3, 8), (0.3, 16),
    ]  # fmt: skip
    assert not any("margin" in params for params in found if params["loss"] == "infonce")


def test_grid_of_a_range_is_refused():
    with pytest.raises(ValueError, match=r"margin: a grid takes choices.*--sampler"):
        proposals.list_first(Tune(sampler="grid"), TrainMatcher(), SPACE)


def test_defaults_and_the_best_of_an_earlier_search_come_first(tmp_path):
    file = tmp_path / "trials.json"
    known = [(0.2, 0.1), (0.9, 0.5), (float("nan"), 0.2), (0.4, 0.9)]  # the last is outside
    trials = [
        {
            "params": {"loss": "triplet", "margin": margin, "lr_heads": 1e-3},
            "metrics": {"val/mrr": v},
        }
        for v, margin in known
    ]
    file.write_text(json.dumps([*trials, {"params": None, "metrics": {}}]))
    found = propose(Tune(enqueue=("defaults", str(file))), count=5)
    assert found[0] == {"loss": "infonce", "lr_heads": 1e-3}
    assert [params["margin"] for params in found[1:4]] == [0.5, 0.1, 0.2]
    assert found[4]["lr_heads"] != 1e-3
    half = proposals.list_first(Tune(enqueue=(str(file),), trials=4), TrainMatcher(), SPACE)
    assert [params["margin"] for params in half] == [0.5, 0.1]


def test_enqueued_settings_outside_of_the_space_are_refused():
    base = TrainMatcher(lr_heads=0.1)
    with pytest.raises(ValueError, match=r"--enqueue defaults: expected.*0\.1.*Widen --space"):
        proposals.list_first(Tune(enqueue=("defaults",)), base, SPACE)


@pytest.mark.parametrize(
    "when", [{"los": ["triplet"]}, {"loss": ["tripel"]}, {"lr_heads": [1e-3]}, {"loss": []}]
)
def test_check_refuses_conditions_on_what_is_no_choice_above(when):
    space = {**SPACE, "margin": {"uniform": [0.05, 0.6], "when": when}}
    with pytest.raises(ValueError, match="margin: expected when to name choices of a field above"):
        search_space.check_space(TrainMatcher(), space)


def test_check_refuses_a_condition_on_a_field_below():
    space = {name: SPACE[name] for name in ("margin", "loss")}
    with pytest.raises(ValueError, match="above it there are"):
        search_space.check_space(TrainMatcher(), space)


def test_conditions_of_a_file_are_those_of_the_space(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "loss: {choice: [triplet, infonce]}\n"
        "margin: {uniform: [0.05, 0.6], when: {loss: [triplet]}}\n"
        "lr_heads: {loguniform: [1e-4, 1e-2]}\n"
    )
    assert search_space.load_space("matcher", str(file)) == SPACE


def test_schedulers_are_chosen_by_name_and_pbt_says_why_not():
    kinds: dict[Scheduler, type] = {
        "asha": AsyncHyperBandScheduler,
        "median": MedianStoppingRule,
        "none": FIFOScheduler,
    }
    for name, kind in kinds.items():
        assert type(proposals.build_scheduler(Tune(scheduler=name))) is kind
    with pytest.raises(ValueError, match=r"checkpoints between trials.*--scheduler asha"):
        Tune(scheduler="pbt")
