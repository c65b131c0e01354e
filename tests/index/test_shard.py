import json
import os

import numpy as np

from cvmatch.data import schema
from cvmatch.index.build import publish
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from tests.helpers import index as tiny


def test_shard_names_its_files_and_tower(model, parts, output):
    info = publish(parts["twelve"], BuildIndex(model=model, output=output))
    folder = os.path.join(output, "shards", info.shards[0].sha)
    with open(os.path.join(folder, "shard.json")) as file:
        about = json.load(file)
    assert (about["rows"], about["tower"]) == (12, info.tower)
    size = os.path.getsize(os.path.join(folder, "vectors.npy"))
    assert size % 64 == 12 * 16 * 2 % 64  # aligned


def test_shards_of_any_size_hold_the_same_tiles_and_give_the_same_answers(
    model, parts, output, tmp_path
):
    publish(parts["all"], BuildIndex(model=model, output=output))
    many = str(tmp_path / "many")
    info = publish(parts["all"], BuildIndex(model=model, output=many), shard_rows=7)
    assert [one.rows for one in info.shards] == [7, 7, 7, 3]
    one, other = Index.open(output), Index.open(many, deep=True)
    assert one.tiles[schema.PAIR_ID].to_pylist() == other.tiles[schema.PAIR_ID].to_pylist()
    rows = np.array([23, 0, 6, 7, 20])
    np.testing.assert_array_equal(one.vectors.take(rows), other.vectors.take(rows))
    for mode in ("exact", "two-stage"):
        assert tiny.find_ids(one, mode) == tiny.find_ids(other, mode)
