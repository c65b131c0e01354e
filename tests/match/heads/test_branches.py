"""Weights of branches: as a plain search over them finds, whatever tiles there are besides."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from cvmatch.match.heads.branches import fit_weights

PAIRS, OTHERS = 40, 200


def cosines(noise: float, others: int, seed: int) -> torch.Tensor:
    """Of vectors of which own pairs are alike, up to noise."""
    made = torch.Generator().manual_seed(seed)
    tiles = torch.nn.functional.normalize(torch.randn(PAIRS + others, 12, generator=made), dim=1)
    queries = tiles[:PAIRS] + noise * torch.randn(PAIRS, 12, generator=made)
    return torch.nn.functional.normalize(queries, dim=1) @ tiles.T


def cross_entropy(found: dict[str, torch.Tensor], share: float, temperature: float) -> float:
    score = (1 - share) * found["direct"].numpy() + share * found["layout"].numpy()
    logits = score / temperature
    return float((np.asarray(logsumexp(logits, axis=1)) - np.diagonal(logits)).mean())


@pytest.mark.parametrize("others", [0, OTHERS])
def test_fitted_weights_are_the_best_of_a_grid(others):
    found = {"direct": cosines(0.4, others, 1), "layout": cosines(0.8, others, 2)}
    weights = fit_weights(found)
    share, temperature = weights.weights["G+A"]["layout"], weights.temperature["G+A"]
    best = cross_entropy(found, share, temperature)
    for one in np.linspace(0, 1, 21):
        for other in temperature * np.geomspace(0.5, 2, 9):
            assert best <= cross_entropy(found, one, other) + 1e-6
    assert 0.02 < share < 0.5
    assert weights.pairs == PAIRS


def test_branch_that_knows_nothing_gets_no_weight_against_many_tiles():
    made = torch.Generator().manual_seed(3)
    noise = 0.3 * torch.randn(PAIRS, PAIRS + OTHERS, generator=made)
    found = {"direct": cosines(0.4, OTHERS, 1), "layout": noise}
    assert fit_weights(found).weights["G+A"]["layout"] < 0.05
