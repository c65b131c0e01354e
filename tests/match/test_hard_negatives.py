"""Near pairs share batches."""

import numpy as np
import pytest
import torch

from cvmatch.data import schema
from cvmatch.match.batches import decode, decode_batch, read_pairs
from cvmatch.match.hard_negatives import (
    GROUP,
    group_neighbours,
    nearest_tiles,
    order_hard_negatives,
)
from cvmatch.runtime.settings import Pool
from tests.helpers.matcher import (
    HIGH,
    SIZE,
    WIDE,
    columns,
    network,
    synthesized_rows,
)


def test_grouped_rows_follow_their_nearest_free_ones():
    place = np.arange(40)  # on a line; the nearest of each, itself first
    near = np.abs(place[:, None] - place).argsort(axis=1, kind="stable")[:, :8]
    order = group_neighbours(near, 4, seed=0)
    assert sorted(order) == list(place)
    first = order[:4]
    assert np.ptp(first) == 3  # a row and its three nearest
    assert list(order) != list(group_neighbours(near, 4, seed=1))
    unknown = group_neighbours(np.full((40, 8), -1), 4, seed=0)
    assert sorted(unknown) == list(place)


def test_nearest_are_those_of_largest_product():
    query, tile = np.random.default_rng(0).normal(size=(2, 12, 5))
    expected = (-(query @ tile.T)).argsort(axis=1)[:, :3]
    assert (nearest_tiles(query, tile, 3) == expected).all()
    assert (nearest_tiles(query[:1], tile[:2], 3)[0, 2:] == -1).all()


@pytest.mark.ray
def test_mined_rows_near_in_space_or_for_the_model_follow_each_other(tmp_path, ray_session):
    names = [f"p{number:02}" for number in range(64)]
    directory = synthesized_rows(str(tmp_path / "rows"), names, towns=4)
    pool = Pool(batch=16)
    kept = order_hard_negatives(read_pairs(directory, "GAS"), "", pool, seed=0).take_all()
    ids = [item[schema.PAIR_ID] for item in kept]
    assert sorted(ids) == names  # the row with an error is left out
    nearby = order_hard_negatives(read_pairs(directory, "GAS"), "", pool, seed=0)
    assert decode(nearby, (HIGH, WIDE), SIZE).count() == 64
    towns = np.array([int(name[1:]) % 4 for name in ids]).reshape(-1, GROUP)
    assert (towns == towns[:, :1]).all()

    model = network(branches=("direct",))
    model.save(str(tmp_path / "model"))
    row_of = {item[schema.PAIR_ID]: item for item in kept}
    learnt = order_hard_negatives(
        read_pairs(directory, "G"), str(tmp_path / "model"), pool, seed=0
    ).take_all()
    ids = [item[schema.PAIR_ID] for item in learnt]
    assert sorted(ids) == names
    batch = decode_batch(columns(*(row_of[name] for name in ids)), (HIGH, WIDE), SIZE)
    with torch.no_grad():
        query = model.embed_queries(torch.from_numpy(batch["ground"]).float() / 255)
        tile = model.embed_tiles(torch.from_numpy(batch["aerial"]).float() / 255)
    score = query @ tile.T
    places = (-score[0]).argsort()
    assert set(places[: GROUP + 1].tolist()) >= set(range(1, GROUP))  # the first row's best tiles
