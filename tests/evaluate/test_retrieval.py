import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from cvmatch.data import schema
from cvmatch.evaluate import retrieval
from cvmatch.evaluate.queries import QueryView, embed_queries
from cvmatch.evaluate.retrieval import KS, Ranking, compare_two_stage, search_exactly, summarize
from cvmatch.evaluate.settings import Evaluate
from cvmatch.index.manifest import AnnInfo, IndexManifest
from cvmatch.index.reader import Index
from cvmatch.index.shard import ShardedArray
from cvmatch.match.heads.branches import SumScorer
from cvmatch.match.heads.joint import JointScorer
from cvmatch.match.infer import EmbedQuery
from cvmatch.match.model import Matcher
from cvmatch.match.settings import MODALITIES
from tests.helpers import index as tiny
from tests.helpers.matcher import copy_of_a, joint_heads
from tests.helpers.present import present

COUNT = 24  # tiles of the index of conftest.py


def of_equal_tiles(index):
    """The index with zeros for all tiles."""
    vectors = ShardedArray([np.zeros_like(array) for array in index.vectors.arrays])
    return dataclasses.replace(index, vectors=vectors)


def plane(angles, places=None, dead=()):
    """An index of tiles at angles (degrees) of a plane, whose score is the cosine of the angle."""
    places = places or [(0.01 * number, 0.0) for number in range(len(angles))]
    tiles = pa.table(
        {
            schema.PAIR_ID: [str(number) for number in range(len(angles))],
            schema.LATITUDE: pa.array([place[0] for place in places], pa.float64()),
            schema.LONGITUDE: pa.array([place[1] for place in places], pa.float64()),
        }
    )
    vectors = directions(angles).numpy().astype(np.float16)
    about = IndexManifest(
        rows=len(vectors),
        width=2,
        preprocess="",
        model="",
        model_parts={},
        config={},
        shard_rows=len(vectors),
        shards=(),
        ann=AnnInfo(key="Flat", nprobe=0),
        shortlist=len(vectors),
    )
    return Index(
        ShardedArray([vectors]),
        tiles,
        [],
        np.array(dead, np.int64),
        SumScorer({"direct": 2}),
        about,
        "",
    )


def directions(angles):
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def looking(*angles):
    return directions(angles)


def test_search_exactly_angles_in_a_plane_give_the_ranks_one_can_see():
    index = plane([0.0, 30.0, 60.0, 90.0])
    # 20 degrees sees tiles 1 (10 away), 0 (20), 2 (40), 3 (70); 80 sees 3 (10), 2 (20), 1, 0.
    ranking = search_exactly(index, looking(20.0, 80.0), torch.tensor([0, 3]), near_m=1500.0)
    assert ranking.rank.tolist() == [1, 0]
    assert ranking.best.tolist() == [[1, 0, 2, 3], [3, 2, 1, 0]]
    assert ranking.score.tolist() == pytest.approx(
        [math.cos(math.radians(20)), math.cos(math.radians(10))], abs=1e-3
    )
    degree = 2 * math.pi * 6_371_008.8 / 360
    assert ranking.distance_m.tolist() == pytest.approx([0.01 * degree, 0.0], abs=1e-3)
    assert ranking.near_count.tolist() == [2, 2]  # itself and the neighbour 1,112 m away
    assert ranking.near_rank.tolist() == [1, 0]
    assert ranking.one_of_ten == {}
    result = summarize(ranking, 4, resamples=200)
    assert result.recalls["recall@1"].value == 0.5
    assert result.recalls["recall@5"].value == present(result.near).recalls["recall@5"] == 1.0
    assert (result.recalls["recall@1%"].value, result.recalls["recall@1%"].k) == (0.5, 1)
    assert result.median_rank == 1.5
    assert result.recalls["recall@1"].low <= 0.5 <= result.recalls["recall@1"].high


def test_search_exactly_in_blocks_equals_one_block(monkeypatch):
    index = plane([7.0 * number for number in range(12)])
    query, truth = looking(*[11.0 * number for number in range(8)]), torch.arange(8)
    whole = search_exactly(index, query, truth, near_m=3000.0)
    monkeypatch.setattr(retrieval, "_BLOCK", 36)  # three queries a block
    parts = search_exactly(index, query, truth, near_m=3000.0)
    for name in ("rank", "best", "near_rank", "near_count"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert 0 <= parts.one_of_ten["top1"] <= parts.one_of_ten["top5"] <= 1


def test_search_exactly_equal_scores_count_against_the_query():
    ranking = search_exactly(
        plane([40.0] * 12), looking(40.0, 40.0), torch.tensor([0, 11]), near_m=100.0
    )
    assert ranking.rank.tolist() == [11, 11]
    assert ranking.one_of_ten == {"top1": 0.0, "top5": 0.0}


def test_search_exactly_deleted_tiles_are_no_rivals():
    index = plane([0.0, 30.0, 60.0, 90.0], dead=[1])
    # 20 degrees would see tile 1 first; tile 1 is also the only one near tile 0.
    ranking = search_exactly(index, looking(20.0, 80.0), torch.tensor([0, 3]), near_m=1500.0)
    assert ranking.rank.tolist() == [0, 0]
    assert ranking.best.tolist() == [[0, 2, 3], [3, 2, 0]]
    assert ranking.score[1].item() == pytest.approx(math.cos(math.radians(10)), abs=1e-3)
    assert ranking.near_count.tolist() == [1, 2]
    assert ranking.distance_m.tolist() == [0.0, 0.0]


def test_search_exactly_one_of_ten_draws_no_deleted_tile():
    query, truth = looking(40.0, 40.0), torch.tensor([0, 99])
    index = plane([40.0] * 100, dead=range(6, 94))
    assert search_exactly(index, query, truth, 100.0).one_of_ten == {
        "top1": 0.0,
        "top5": 0.0,
    }
    few = plane([40.0] * 100, dead=range(6, 97))
    assert search_exactly(few, query, truth, 100.0).one_of_ten == {}


def test_search_exactly_tile_without_coordinates_is_near_nothing():
    nowhere = (math.nan, math.nan)
    index = plane([0.0, 30.0, 60.0], places=[(0.0, 0.0), nowhere, (0.0, 0.001)])
    ranking = search_exactly(index, looking(0.0, 30.0), torch.tensor([0, 1]), near_m=1000.0)
    assert ranking.near_count.tolist() == [2, 0]
    assert ranking.distance_m.isnan().tolist() == [False, True]
    result = summarize(ranking, 3, resamples=10)
    near = present(result.near)
    assert (near.queries, near.gallery) == (1, 2.0)
    assert present(result.distance).median == 0.0


def test_summarize_counts_first_answers_within_metres_of_the_queries_whose_place_is_known():
    metres = torch.tensor([0.0, 25.0, 26.0, 80.0, 500.0, torch.nan])
    none = torch.zeros(6, dtype=torch.int64)
    ranking = Ranking(
        rank=none, score=metres, best=none[:, None], best_score=metres[:, None], near_rank=none,
        near_count=torch.ones(6, dtype=torch.int64), distance_m=metres, heading_index=none,
        one_of_ten={},
    )  # fmt: skip
    found = present(summarize(ranking, 10, resamples=5).distance)
    assert found.within == {"25m": 0.4, "50m": 0.6, "100m": 0.8}
    assert (found.median, found.mean) == (26.0, pytest.approx(631 / 5))
    assert found.p90 == pytest.approx(80 + 0.6 * 420)  # of five: between the last two


def test_summarize_guess_among_the_tiles_nearby_is_that_of_each_query():
    whole, none = torch.zeros(3, dtype=torch.int64), torch.full((3,), torch.nan)
    ranking = Ranking(
        rank=whole, score=none, best=whole[:, None], best_score=none[:, None], near_rank=whole,
        near_count=torch.tensor([2, 100, 1]), distance_m=none, heading_index=whole, one_of_ten={},
    )  # fmt: skip
    result = summarize(ranking, 500, resamples=5)
    near = present(result.near)
    assert (near.queries, near.gallery) == (2, 51.0)
    assert near.chance["recall@1"] == pytest.approx((1 / 2 + 1 / 100) / 2)
    assert near.chance["recall@5"] == pytest.approx((1 + 5 / 100) / 2)


def test_compare_two_stage_of_the_whole_gallery_keeps_every_exact_answer(tmp_path):
    index = tiny.index(str(tmp_path), score="joint")
    batch = EmbedQuery(index.matcher_dir, "G+A+S")(tiny.columns(tiny.rows(10)))
    query = torch.from_numpy(batch["query_vector"])
    truth = torch.arange(10)
    ranking = search_exactly(index, query, truth, 1000.0)
    result = compare_two_stage(index, query, truth, ranking)
    assert (result.exact_top1_kept, result.exact_top10_kept) == (1.0, 1.0)
    assert result.recalls["recall@10"] == (ranking.rank < 10).double().mean().item()
    manifest = dataclasses.replace(index.manifest, shortlist=10)
    few = dataclasses.replace(index, manifest=manifest)
    result = compare_two_stage(few, query, truth, ranking)
    assert result.exact_top10_kept < 1
    held = (few.find_nearest(query, 10) == truth.numpy()[:, None]).any(axis=1)
    assert result.recalls["recall@10"] == held.mean() < 1


def test_compare_two_stage_equal_scores_count_against_the_query(index):
    opened, truth = of_equal_tiles(index), torch.arange(10)
    same = torch.ones(10, 16)
    ranking = search_exactly(opened, same, truth, 1000.0)
    result = compare_two_stage(opened, same, truth, ranking)
    for k in KS:
        assert result.recalls[f"recall@{k}"] == (ranking.rank < k).double().mean().item() == 0.0


@pytest.mark.parametrize("score", ["sum", "joint"])
def test_constant_embeddings_are_never_above_chance(tmp_path, score):
    opened = of_equal_tiles(tiny.index(str(tmp_path), COUNT, score=score))
    model = Matcher.load(opened.matcher_dir)
    tiny.write(tiny.rows(COUNT), str(tmp_path / "queries"))
    config = Evaluate(queries=str(tmp_path / "queries"))
    queries = embed_queries(config, model)
    assert [modality for _, modality in queries] == list(MODALITIES)
    for query in queries.values():
        ranking = search_exactly(opened, query[:1].expand(COUNT, -1), torch.arange(COUNT), 1000.0)
        result = summarize(ranking, COUNT, resamples=10)
        assert result.recalls["recall@1"].value <= 1 / COUNT
        assert result.recalls["recall@10"].value <= 10 / COUNT
        assert result.one_of_ten["top1"] <= 0.1
        assert result.one_of_ten["top5"] <= 0.5
        assert result.median_rank == COUNT


def test_joint_model_that_copies_a_and_ignores_tiles_is_exposed(tmp_path):
    # A query and a tile's embedding with that query's A are equal: in a loss or a protocol that
    # embedded each tile with the A of its own pair, it would find every tile.
    opened = tiny.index(str(tmp_path), COUNT, score="joint")
    model = Matcher.load(opened.matcher_dir)
    heads = copy_of_a(joint_heads(model))
    opened = dataclasses.replace(of_equal_tiles(opened), scorer=JointScorer(heads))
    tiny.write(tiny.rows(COUNT), str(tmp_path / "queries"))
    queries = embed_queries(Evaluate(queries=str(tmp_path / "queries")), model)
    query = queries[QueryView(360.0, False), "G+A"]
    with torch.inference_mode():
        embedding, query_proj = heads.split(query)
        candidate = heads.candidate_embedding(torch.zeros_like(query_proj), query_proj)
    torch.testing.assert_close((candidate * embedding).sum(1), torch.ones(COUNT))  # the leak
    ranking = search_exactly(opened, query, torch.arange(COUNT), 1000.0)
    assert (ranking.rank == COUNT - 1).all()  # every tile ties


def test_the_best_of_a_querys_vectors_counts_and_says_its_heading():
    index = plane([0, 40, 90, 140])
    # Three vectors each: the second query meets its tile, at 90, with the third of them alone.
    query = torch.stack([looking(2, 200, 300), looking(30, 250, 91)])
    ranking = search_exactly(index, query, torch.tensor([0, 2]), near_m=10.0)
    scores = np.cos(np.deg2rad(np.array([[2, 200, 300], [30, 250, 91]])[..., None]
                               - np.array([0, 40, 90, 140])))  # fmt: skip
    np.testing.assert_allclose(ranking.best_score, -np.sort(-scores.max(axis=1)), atol=2e-3)
    assert ranking.rank.tolist() == [0, 0]
    assert ranking.heading_index.tolist() == [0, 2]
    tried = np.array([0.0, 120.0, 240.0])
    turns = torch.tensor([350.0, 236.0])
    errors = np.abs((tried[[0, 2]] - turns.numpy() + 180) % 360 - 180)
    found = retrieval.measure_heading_error(ranking, turns, 3)
    assert found == pytest.approx(sorted(errors)[0])  # torch's median of two is the lower


def test_one_vector_alone_ranks_as_before():
    index = plane([0, 40, 90, 140])
    flat = search_exactly(index, looking(20, 100), torch.tensor([0, 2]), near_m=10.0)
    deep = search_exactly(index, looking(20, 100)[:, None], torch.tensor([0, 2]), near_m=10.0)
    assert torch.equal(flat.rank, deep.rank)
    assert torch.equal(flat.best_score, deep.best_score)
