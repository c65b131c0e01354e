"""Losses by hand, and of a single pair."""

import math

import pytest
import torch

from cvmatch.match import losses

# Own pairs 0.5, 0.3; the others 0.4 (query 0, tile 1) and 0.1 (query 1, tile 0).
SCORE = torch.tensor([[0.5, 0.4], [0.1, 0.3]])


def test_triplet_by_hand():
    # Rows: 0.2 - 0.5 + 0.4 = 0.1; 0.2 - 0.3 + 0.1 = 0. Columns: 0.2 - 0.5 + 0.1 < 0, so 0;
    # 0.2 - 0.3 + 0.4 = 0.3. The mean of 0.1, 0, 0 and 0.3.
    assert losses.triplet(SCORE, 0.2).item() == pytest.approx(0.1)


def test_triplet_of_three_pairs_by_hand():
    score = torch.tensor([[0.5, 0.7, 0.4], [0.2, 0.5, 0.3], [0.1, 0.6, 0.5]])
    # Margin 0.2: hinge = score - 0.3. Rows 0.4 0.1 | 0 0 | 0 0.3, columns 0 0 | 0.4 0.3 | 0.1 0.
    assert losses.triplet(score, 0.2).item() == pytest.approx(0.8 / 6, abs=1e-6)


def test_info_nce_by_hand():
    def entropy(own, other):
        return math.log(1 + math.exp(2 * (other - own)))

    expected = (entropy(0.5, 0.4) + entropy(0.3, 0.1) + entropy(0.5, 0.1) + entropy(0.3, 0.4)) / 4
    assert losses.info_nce(SCORE, torch.tensor(2.0)).item() == pytest.approx(expected)


def test_info_nce_smoothing_gives_others_their_share():
    # With own 1, other 0, scale 1: -log p is log(1 + 1/e) for the own and 1 more for the other.
    expected = 0.95 * math.log1p(math.exp(-1)) + 0.05 * (1 + math.log1p(math.exp(-1)))
    got = losses.info_nce(torch.eye(2), torch.tensor(1.0), smoothing=0.1)
    assert got.item() == pytest.approx(expected)


def test_losses_of_a_single_pair_are_zero_and_have_a_gradient():
    score = torch.tensor([[0.3]], requires_grad=True)
    total = losses.triplet(score, 0.2) + losses.info_nce(score, torch.tensor(5.0))
    total.backward()
    assert total.item() == pytest.approx(0)
    assert score.grad is not None
