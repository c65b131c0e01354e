"""Which pairs no training of a split learns from."""

import random

import pytest

from cvmatch.training.held_out import HELD_OUT, choose_held_out

IDS = [f"{number:07d}" for number in range(1000)]


@pytest.mark.parametrize(("count", "held"), [(0, 0), (9, 0), (10, 1), (640, 64), (1000, HELD_OUT)])
def test_at_most_a_tenth_is_held_out(count, held):
    assert len(choose_held_out(IDS[:count])) == held


def test_same_pairs_are_held_out_whatever_their_order():
    mixed = random.Random(0).sample(IDS, len(IDS))
    assert choose_held_out(mixed) == choose_held_out(IDS)


def test_most_stay_held_out_when_some_pairs_fail():
    before = set(choose_held_out(IDS))
    lost = sorted(before)[0]
    after = set(choose_held_out([one for one in IDS if one != lost]))
    assert len(before & after) == HELD_OUT - 1
