"""Probabilities of answers: right on average, whether the place is in the index or not."""

import numpy as np
import pytest

from cvmatch.nn.calibration import (
    Answers,
    Calibration,
    calibrate,
    measure_auroc,
    measure_error,
)


def simulate(count: int, seed: int, tiles: int = 64, noise: float = 0.1) -> Answers:
    """Queries as a matcher might answer them: the own tile scores more, by much or by little."""
    draw = np.random.default_rng(seed)
    scores = noise * draw.normal(size=(count, tiles))
    scores[:, 0] += draw.uniform(0.1, 0.9, count)
    order = np.argsort(-scores, axis=1)
    return Answers(np.take_along_axis(scores, order, 1), np.argmax(order == 0, axis=1))


def test_probabilities_of_unseen_queries_are_as_often_right_as_they_say():
    fitted = calibrate(simulate(400, seed=0))
    assert fitted is not None
    unseen = simulate(4000, seed=1)
    both = [fitted.probabilities(one)[:, 0] for one in (unseen.scores, unseen.without_own())]
    right = np.concatenate([unseen.places == 0, np.zeros(4000, bool)])
    assert measure_error(np.concatenate(both), right) < 0.05
    assert fitted.error < 0.08
    here, away = fitted.present(unseen.scores), fitted.present(unseen.without_own())
    assert measure_auroc(here, away) == pytest.approx(fitted.auroc, abs=0.05)
    assert measure_auroc(here, away) > 0.8


def test_probabilities_of_all_tiles_and_of_none_sum_to_one():
    fitted = Calibration(0.1, 0.5, 0.2, 0.3, queries=100)
    scores = simulate(5, seed=2).scores
    whole = fitted.probabilities(scores).sum(axis=1) + 1 - fitted.present(scores)
    np.testing.assert_allclose(whole, 1.0)
    assert (np.diff(fitted.probabilities(scores), axis=1) <= 0).all()


def test_probability_of_an_only_tile_and_of_missing_ones_is_finite():
    fitted = Calibration(0.1, 0.5, 0.2, 0.3, queries=100)
    alone = fitted.probabilities(np.array([[0.7]]))
    padded = fitted.probabilities(np.array([[0.7, -np.inf, -np.inf]]))
    assert 0 < alone[0, 0] < 1
    assert padded[0].tolist() == [alone[0, 0], 0.0, 0.0]


def test_few_queries_are_not_calibrated():
    assert calibrate(simulate(20, seed=0)) is None


def test_own_tile_is_left_out_where_it_is_and_the_last_one_where_it_is_not_among_the_best():
    answers = Answers(np.array([[0.9, 0.5, 0.1], [0.8, 0.6, 0.2]]), np.array([1, 3]))
    assert answers.without_own().tolist() == [[0.9, 0.1], [0.8, 0.6]]


def test_calibration_error_is_the_mean_distance_of_what_is_said_from_what_is_so():
    said = np.repeat([0.25, 0.75], 100)
    so = np.concatenate([np.arange(100) % 4 == 0, np.arange(100) % 4 == 0])
    assert measure_error(said, so) == pytest.approx(0.25, abs=0.01)


def test_auroc_is_the_share_of_pairs_in_order():
    assert measure_auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == 3.5 / 4
