import math

import pytest

from cvmatch.tune.trials import Goal, TrialState, TrialSummary, find_front, order_trials, value_of

GOALS: list[Goal] = [("val/mrr", "max"), ("seconds", "min")]


def trial(name: str, mrr: float, seconds: float, state: TrialState = "finished") -> TrialSummary:
    return TrialSummary(
        trial=name,
        params={},
        metrics={"val/mrr": mrr},
        error="",
        state=state,
        history=[],
        seconds=seconds,
    )


def test_front_is_what_no_other_beats_in_all():
    trials = [
        trial("cheap", 0.5, 10),
        trial("dear and poor", 0.4, 30),
        trial("good", 0.9, 40),
        trial("between", 0.7, 20),
        trial("beaten in time alone", 0.7, 25),
        trial("unknown", math.nan, 1),
    ]
    assert [one["trial"] for one in find_front(trials, GOALS)] == ["good", "between", "cheap"]


def test_front_keeps_equal_trials_and_leaves_out_those_that_did_not_end():
    trials = [
        trial("one", 0.5, 10),
        trial("other", 0.5, 10),
        trial("stopped", 0.6, 1, "stopped early"),
        trial("failed", 0.9, 1, "failed"),
    ]
    assert [one["trial"] for one in find_front(trials, GOALS)] == ["one", "other"]


@pytest.mark.parametrize(("mode", "order"), [("max", "bac"), ("min", "abc")])
def test_trials_without_a_value_come_last(mode, order):
    trials = [trial("c", math.nan, 0), trial("a", 0.1, 0), trial("b", 0.2, 0)]
    found = order_trials(trials, ("val/mrr", mode))
    assert "".join(one["trial"] for one in found) == order


def test_value_of_a_metric_that_lacks_is_nan():
    assert math.isnan(value_of(trial("a", 0.1, 3), "val/loss"))
    assert value_of(trial("a", 0.1, 3), "seconds") == 3
