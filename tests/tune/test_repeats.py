import math

import numpy as np
import pytest
from scipy import stats

from cvmatch.tune import repeats
from cvmatch.tune.settings import Tune
from cvmatch.tune.trials import TrialState, TrialSummary


def trial(
    name: str, mrr: float, params: dict, state: TrialState = "finished", test: float = 0.0
) -> TrialSummary:
    return TrialSummary(
        trial=name,
        params=params,
        metrics={"val/mrr": mrr, "test/mrr": test},
        error="",
        state=state,
        history=[],
        seconds=1.0,
    )


def test_candidates_are_the_defaults_and_the_best_that_ended():
    trials = [
        trial("a", 0.5, {"lr": 1.0}),
        trial("b", 0.7, {"lr": 2.0}),
        trial("c", 0.9, {"lr": 3.0}, "stopped early"),
        trial("d", 0.6, {"lr": 4.0}),
        trial("e", math.nan, {"lr": 5.0}),
    ]
    found = repeats.list_candidates(Tune(repeats=3, finalists=2), trials)
    assert found == {"defaults": {}, "b": {"lr": 2.0}, "d": {"lr": 4.0}}


def test_candidates_of_equal_settings_are_one():
    trials = [
        trial("a", 0.9, {"lr": 1.0}),
        trial("b", 0.8, {"lr": 2.0}),
        trial("c", 0.7, {"lr": 2.0}),
        trial("d", 0.6, {"lr": 4.0}),
    ]
    found = repeats.list_candidates(Tune(repeats=3, finalists=2), trials, {"lr": 1.0})
    assert found == {"defaults": {}, "b": {"lr": 2.0}, "d": {"lr": 4.0}}


def test_each_candidate_is_trained_with_seeds_that_the_search_did_not_use():
    points = repeats.list_points(Tune(repeats=2), {"defaults": {}, "b": {"lr": 2.0}}, seed=5)
    assert points == [
        {"fit.seed": 6},
        {"fit.seed": 7},
        {"lr": 2.0, "fit.seed": 6},
        {"lr": 2.0, "fit.seed": 7},
    ]


def test_the_best_by_the_mean_comes_first_and_one_that_failed_last():
    candidates = {"defaults": {}, "lucky": {"lr": 2.0}, "steady": {"lr": 3.0}, "frail": {"lr": 4.0}}
    values = [0.5, 0.5, 0.95, 0.2, 0.7, 0.72, 0.99, math.nan]
    trainings = [
        trial(str(number), value, {"number": number}, test=value / 2)
        for number, value in reversed([*enumerate(values)])
    ]
    config = Tune(repeats=2, test="unseen.yaml")
    found = repeats.collect(config, candidates, trainings)
    assert [one["trial"] for one in found] == ["steady", "lucky", "defaults", "frail"]
    assert found[0]["values"] == [0.7, 0.72]
    assert found[0]["test"] == [0.35, 0.36]
    assert found[0]["params"] == {"lr": 3.0}


@pytest.mark.parametrize("of_test", [False, True])
def test_difference_to_the_defaults_is_paired_by_seed(of_test):
    own, other = np.array([0.3, 0.5, 0.9]), np.array([0.2, 0.45, 0.7])
    repeated = [
        repeats.RepeatedTrial(trial="a", params={}, values=[*own], test=[*(own + 1)]),
        repeats.RepeatedTrial(trial="defaults", params={}, values=[*other], test=[*other]),
    ]
    difference = own - other + of_test
    expected = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    found = repeats.subtract_defaults(repeated[0], repeated, of_test)
    assert found.value == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
