"""The matcher: what queries depend on, projections, saving and loading."""

import json

import pytest
import torch

from cvmatch.data import images, manifest, storage
from cvmatch.match.heads.branches import FusionWeights, embed_layout
from cvmatch.match.model import Matcher, fingerprint_parts, load_scorer
from cvmatch.match.settings import MODALITIES
from cvmatch.nn import geometry
from tests.helpers.matcher import (
    SIZE,
    branch_heads,
    joint_heads,
    network,
    rows,
    views,
)

NAMED = {"G": "ground", "A": "synthetic", "S": "synthetic_mask"}


@torch.no_grad()
@pytest.mark.parametrize("score", ["sum", "joint"])
def test_query_of_each_modality_depends_on_its_own_pictures_only(score):
    model, seen, other = network(score=score), views(rows(3)), views(rows(3, seed=1))
    for modality in MODALITIES:
        used = [NAMED[letter] for letter in modality.split("+")]
        before = model.embed_queries(**{name: getattr(seen, name) for name in used})
        for name in used:
            changed = {n: getattr(other if n == name else seen, n) for n in used}
            same = torch.allclose(model.embed_queries(**changed), before)
            assert same == (score == "sum" and name == "synthetic_mask")  # S has no branch


@pytest.mark.parametrize("score", ["sum", "joint"])
def test_query_of_nothing_is_refused(score):
    with pytest.raises(ValueError, match=r"matcher: .*a query"):
        network(score=score).embed_queries()


def test_query_of_g_by_a_model_without_a_branch_for_it_is_refused():
    model = network(branches=("aerial", "layout"))
    with pytest.raises(ValueError, match="know nothing of a query of G"):
        model.embed_queries(views(rows(2)).ground)


@torch.no_grad()
def test_layout_correlates_pictures_at_low_resolution():
    tiles = torch.rand(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    score = embed_layout(tiles) @ embed_layout(tiles * 0.5 + 0.2).T  # another light
    torch.testing.assert_close(score.diagonal(), torch.ones(4), atol=1e-3, rtol=0)
    assert score.fill_diagonal_(0).abs().max() < 0.6
    assert not embed_layout(torch.full((1, 3, 64, 64), 0.3)).any()  # a flat one fits nothing


@torch.no_grad()
def test_square_view_and_polar_view_read_the_same_tile_differently():
    seen = views(rows(3))
    polar, square = (
        network(panorama=(SIZE, SIZE), projection=kind, branches=("direct",))
        for kind in ("polar", "square")
    )
    square.load_state_dict(polar.state_dict())
    unrolled = geometry.to_polar(seen.aerial, SIZE, SIZE)
    torch.testing.assert_close(square.embed_tiles(unrolled), polar.embed_tiles(seen.aerial))
    assert not torch.allclose(square.embed_tiles(seen.aerial), polar.embed_tiles(seen.aerial))


@pytest.mark.parametrize("changes", [{}, {"score": "joint"}, {"branches": ("direct",)}])
@torch.no_grad()
def test_model_saved_and_loaded_scores_the_same_without_its_towers_too(tmp_path, changes):
    model, seen = network(**changes), views(rows(3))
    if not changes:
        branch_heads(model).weights = FusionWeights.normalised({"direct": 1.0, "aerial": 2.0})
    model.save(str(tmp_path))
    again, scorer = Matcher.load(str(tmp_path)), load_scorer(str(tmp_path))
    assert again.config == model.config
    pictures = [getattr(seen, NAMED[letter]) for letter in model.config.letters]
    query, tile = model.embed_queries(*pictures), model.embed_tiles(seen.aerial)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    # Weights that were read lie elsewhere in memory, which may move the last bit of a product.
    torch.testing.assert_close(again.embed_queries(*pictures), query, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.embed_tiles(seen.aerial), tile, atol=1e-6, rtol=0)
    assert (query.shape[1], tile.shape[1]) == (scorer.width, model.config.width)
    expected = query @ tile.T
    if model.config.score == "joint":
        heads = joint_heads(model)
        expected = heads.pair_scores(heads.split(query), tile[:, scorer.shortlist_width :])
    torch.testing.assert_close(scorer(query, tile), expected, atol=1e-5, rtol=0)


def test_model_in_an_object_store_is_the_one_that_was_saved(bucket, tmp_path):
    model, seen = network(), views(rows(3))
    model.save(str(tmp_path / "model"))
    uri = f"{bucket}/models/matcher"
    for name in ("config.json", "model.safetensors", "fusion.json"):
        storage.write_bytes(storage.join(uri, name), (tmp_path / "model" / name).read_bytes())
    with torch.no_grad():
        torch.testing.assert_close(
            Matcher.load(uri).embed_tiles(seen.aerial), model.embed_tiles(seen.aerial)
        )
    assert load_scorer(uri).width == model.config.width
    assert fingerprint_parts(uri) == fingerprint_parts(str(tmp_path / "model"))
    assert manifest.fingerprint(uri) == manifest.fingerprint(str(tmp_path / "model"))


@pytest.mark.parametrize("load", [Matcher.load, load_scorer])
def test_model_directory_absent_is_refused_with_advice(tmp_path, load):
    with pytest.raises(ValueError, match=r"cvmatch train-matcher published\), found none"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [Matcher.load, load_scorer])
def test_model_of_an_older_format_is_refused(tmp_path, load):
    network().save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 1}))
    with pytest.raises(ValueError, match="format 1, this version reads 4"):
        load(str(tmp_path))


def test_model_of_another_preprocessing_is_refused(tmp_path):
    network(preprocess="opencv-linear-0").save(str(tmp_path))
    with pytest.raises(ValueError, match=rf"opencv-linear-0.*{images.PREPROCESS}"):
        Matcher.load(str(tmp_path))
