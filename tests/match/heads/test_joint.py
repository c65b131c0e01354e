"""Scores: the split form of a joint one, chunks, half precision, bf16; a sum as one product."""

import pytest
import torch
from torch.nn import functional as F

from cvmatch.match.heads.branches import SumScorer
from cvmatch.match.heads.joint import JointScorer
from tests.helpers.matcher import (
    branch_heads,
    joined,
    joint_heads,
    network,
    rows,
    views,
)
from tests.helpers.present import present


def random_heads(hidden=10):
    return joint_heads(network(score="joint", hidden=hidden))


def random_vectors(queries, tiles, width=10):
    """Query vectors, and tile vectors of which a joint score reads the second half."""
    embedding = F.normalize(torch.randn(queries, width), dim=1)
    tile_proj = torch.randn(tiles, width)
    query = torch.cat([embedding, torch.randn(queries, width)], dim=1)
    return query, torch.cat([torch.full_like(tile_proj, torch.nan), tile_proj], dim=1)


@torch.no_grad()
def test_joint_scores_split_equal_the_concatenated_form():
    model, seen = network(score="joint"), views(rows(5))
    query = model.embed_queries(seen.ground, seen.synthetic, seen.synthetic_mask)
    heads = joint_heads(model)
    scores = JointScorer(heads)(query, model.embed_tiles(seen.aerial), chunk=3)
    a, c = model.aerial_features(present(seen.synthetic)), model.aerial_features(seen.aerial)
    embedding = heads.split(query).embedding
    expected = [[embedding[i] @ joined(heads, a[i], c[j]) for j in range(5)] for i in range(5)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 6, 7, 1000])
def test_joint_scores_chunked_equal_those_of_one_piece(chunk):
    joint = random_heads()
    query, tile = random_vectors(4, 6)
    expected = joint.pair_scores(joint.split(query), tile[:, 10:])
    torch.testing.assert_close(JointScorer(joint)(query, tile, chunk=chunk), expected)


@torch.no_grad()
def test_joint_scores_of_tiles_stored_in_half_precision_stay_close():
    joint = random_heads()
    query, tile = random_vectors(4, 50)
    scores = JointScorer(joint)(query, tile.half())
    assert scores.dtype == torch.float32
    expected = joint.pair_scores(joint.split(query), tile[:, 10:])
    torch.testing.assert_close(scores, expected, atol=5e-3, rtol=0)


@torch.no_grad()
def test_joint_scores_in_bf16_are_near_and_keep_the_best_in_reach():
    scorer = JointScorer(random_heads(64))
    query, tile = random_vectors(4, 500, 64)
    exact, found = scorer(query, tile), scorer(query, tile, torch.bfloat16)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.02
    best = found.topk(20).indices
    assert all(row in kept for row, kept in zip(exact.argmax(1), best, strict=True))


@torch.no_grad()
def test_joint_shortlist_times_a_ground_query_is_its_exact_score():
    model, seen = network(score="joint"), views(rows(5))
    query, tile = model.embed_queries(seen.ground), model.embed_tiles(seen.aerial)
    scorer = JointScorer(joint_heads(model))
    width = scorer.shortlist_width
    torch.testing.assert_close(query[:, :width] @ tile[:, :width].T, scorer(query, tile))


@torch.no_grad()
@pytest.mark.parametrize("modality", ["G", "G+A", "A"])
def test_sum_of_weighted_cosines_is_one_product(modality):
    model, seen = network(), views(rows(5))
    pictures = {"G": {"ground": seen.ground}, "A": {"synthetic": seen.synthetic}}
    letters = modality.split("+")
    given = {name: picture for letter in letters for name, picture in pictures[letter].items()}
    scorer = SumScorer(model.config.parts)
    tile = model.embed_tiles(seen.aerial)
    scores = scorer(model.embed_queries(**given), tile.half())
    heads = branch_heads(model)
    queries = heads.query_parts(model.query_features(**given))
    tiles = heads.tile_parts(model.tile_features(seen.aerial))
    weights = heads.weights.weights[modality]
    assert sum(weights.values()) == pytest.approx(1)
    expected = sum(weight * queries[name] @ tiles[name].T for name, weight in weights.items())
    torch.testing.assert_close(scores, expected, atol=2e-3, rtol=0)
    assert scorer.shortlist_width == tile.shape[1]
    each = scorer.split(model.embed_queries(**given)[0], tile)
    assert set(each) == {"direct", "aerial", "layout"}
    for name, added in each.items():
        own = weights.get(name, 0) * queries.get(name, tiles[name])[:1] @ tiles[name].T
        torch.testing.assert_close(added, own[0], atol=1e-6, rtol=0)
