import math

import pytest
import torch

from cvmatch.nn import rng

KEYS = torch.tensor([rng.row_key(f"{index:07d}") for index in range(2000)])


def test_mix_gives_the_published_sequence_of_splitmix64():
    seed, golden = 1234567, rng._GOLDEN
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    state = torch.tensor(seed) + torch.arange(1, 4) * golden  # wraps, as it should
    assert [value % 2**64 for value in rng._mix(state).tolist()] == list(published)


def test_keys_are_distinct_and_fit_int64():
    keys = {rng.row_key(f"{index:07d}") for index in range(50_000)}
    assert len(keys) == 50_000
    assert min(keys) >= 0
    assert max(keys) < 2**63
    assert max(keys) > 2**62  # the whole range is in use


def test_stream_differs_by_seed_epoch_and_purpose():
    streams = {
        rng.fold_in(seed, epoch, purpose)
        for seed in range(3)
        for epoch in range(3)
        for purpose in ("", "noise", "step")
    }
    assert len(streams) == 27


def test_draws_of_a_row_do_not_depend_on_the_batch():
    number = rng.fold_in(3, 1, "noise")
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))
    for draw in (rng.uniform, rng.normal):
        whole = draw(KEYS, number, 3, 5)
        shuffled = torch.cat([draw(part, number, 3, 5) for part in KEYS[order].split(37)])
        assert torch.equal(shuffled, whole[order])


def test_uniform_is_flat_on_the_unit_interval():
    values = rng.uniform(KEYS, rng.fold_in(0), 50)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    expected = values.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi square, 19 degrees, p = 0.001


def test_normal_has_the_moments_of_a_normal():
    values = rng.normal(KEYS, rng.fold_in(0), 50)
    spread = 5 / math.sqrt(values.numel())  # five standard errors of the mean
    assert abs(values.mean()) < spread
    assert values.var().item() == pytest.approx(1, abs=spread * math.sqrt(2))
    assert (values**4).mean().item() == pytest.approx(3, abs=spread * math.sqrt(96))
    assert torch.isfinite(values).all()


def test_draws_of_two_streams_rows_and_positions_do_not_correlate():
    one = rng.normal(KEYS, rng.fold_in(0), 2)
    two = rng.normal(KEYS, rng.fold_in(1), 2)
    next_row = rng.normal(KEYS + 1, rng.fold_in(0), 2)
    table = torch.cat([one, two, next_row], dim=1).T
    off = torch.corrcoef(table) - torch.eye(len(table))
    assert off.abs().max() < 4.5 / math.sqrt(len(KEYS))


def test_uniform_without_shape_is_a_number_for_each_row():
    assert rng.uniform(KEYS, 7).shape == (len(KEYS),)
    assert torch.equal(rng.uniform(KEYS, 7), rng.uniform(KEYS, 7, 4)[:, 0])
