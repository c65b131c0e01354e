"""Joint scores: the split form, chunks, half precision, bf16."""

import pytest
import torch
from torch.nn import functional as F

from cvmatch.match.fusion import Query
from cvmatch.match.scoring import joint_scores
from tests.helpers.matcher import (
    joined,
    network,
    rows,
    views,
)
from tests.helpers.present import present


@torch.no_grad()
def test_scores_split_equal_the_concatenated_form():
    model, seen = network(), views(rows(5))
    query = model.embed_queries(seen.ground, seen.synthetic, seen.synthetic_mask)
    scores = joint_scores(model, query, model.project_tiles(seen.aerial), chunk=3)
    a, c = model.aerial_features(present(seen.synthetic)), model.aerial_features(seen.aerial)
    expected = [
        [query.embedding[i] @ joined(model, a[i], c[j]) for j in range(5)] for i in range(5)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 6, 7, 1000])
def test_scores_chunked_equal_those_of_one_piece(chunk):
    model = network()
    query = Query(F.normalize(torch.randn(4, 10), dim=1), torch.randn(4, 10))
    tile_proj = torch.randn(6, 10)
    torch.testing.assert_close(
        joint_scores(model, query, tile_proj, chunk=chunk), model.pair_scores(query, tile_proj)
    )


@torch.no_grad()
def test_scores_of_tiles_stored_in_half_precision_stay_close():
    model = network()
    query = Query(F.normalize(torch.randn(4, 10), dim=1), torch.randn(4, 10))
    tile_proj = torch.randn(50, 10)
    scores = joint_scores(model, query, tile_proj.half())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model.pair_scores(query, tile_proj), atol=5e-3, rtol=0)


@torch.no_grad()
def test_scores_in_bf16_are_near_and_keep_the_best_in_reach():
    model = network(hidden=64)
    query = Query(F.normalize(torch.randn(4, 64), dim=1), torch.randn(4, 64))
    tile_proj = torch.randn(500, 64)
    exact = joint_scores(model, query, tile_proj)
    found = joint_scores(model, query, tile_proj, torch.bfloat16)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.02
    best = found.topk(20).indices
    assert all(row in kept for row, kept in zip(exact.argmax(1), best, strict=True))


@torch.no_grad()
def test_shortlist_times_a_ground_query_is_its_exact_score():
    model, seen = network(), views(rows(5))
    query, tile_proj = model.embed_queries(seen.ground), model.project_tiles(seen.aerial)
    torch.testing.assert_close(
        query.embedding @ model.shortlist_embedding(tile_proj).T,
        joint_scores(model, query, tile_proj),
    )
