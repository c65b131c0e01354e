"""The matcher: what queries depend on, projections, saving and loading."""

import json

import pytest
import torch

from cvmatch.data import geometry, images
from cvmatch.match.model import Matcher, load_fusion
from cvmatch.match.scoring import joint_scores
from cvmatch.match.settings import MODALITIES
from tests.helpers.matcher import (
    SIZE,
    network,
    rows,
    views,
)
from tests.helpers.present import present


@torch.no_grad()
def test_query_of_each_modality_depends_on_its_own_pictures_only():
    model, seen, other = network(), views(rows(3)), views(rows(3, seed=1))
    named = {"G": "ground", "A": "synthetic", "S": "synthetic_mask"}
    for modality in MODALITIES:
        used = [named[letter] for letter in modality.split("+")]
        before = model.embed_queries(**{name: getattr(seen, name) for name in used})
        assert torch.allclose(before.embedding.norm(dim=1), torch.ones(3))
        for name in used:
            changed = {n: getattr(other if n == name else seen, n) for n in used}
            assert not torch.allclose(model.embed_queries(**changed).embedding, before.embedding)


def test_query_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one of ground, synthetic and synthetic_mask"):
        network().embed_queries()


@torch.no_grad()
def test_square_view_and_polar_view_read_the_same_tile_differently():
    seen = views(rows(3))
    polar, square = (
        network(panorama=(SIZE, SIZE), projection=kind) for kind in ("polar", "square")
    )
    square.load_state_dict(polar.state_dict())
    unrolled = geometry.to_polar(seen.aerial, SIZE, SIZE)
    torch.testing.assert_close(square.project_tiles(unrolled), polar.project_tiles(seen.aerial))
    assert not torch.allclose(square.project_tiles(seen.aerial), polar.project_tiles(seen.aerial))


def test_model_saved_and_loaded_scores_the_same(tmp_path):
    model, seen = network(), views(rows(3))
    model.save(str(tmp_path))
    again = Matcher.load(str(tmp_path))
    assert again.config == model.config
    with torch.no_grad():
        first, second = (
            joint_scores(
                m,
                m.embed_queries(seen.ground, seen.synthetic, seen.synthetic_mask),
                m.project_tiles(seen.aerial),
            )
            for m in (model, again)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("ground_only", [False, True])
@torch.no_grad()
def test_heads_loaded_without_towers_score_as_the_whole_model(tmp_path, ground_only):
    model, seen = network(ground_only=ground_only), views(rows(3))
    model.save(str(tmp_path))
    heads = load_fusion(str(tmp_path))
    assert heads.training is False
    features = {"ground": model.ground_features(seen.ground), "synthetic": None, "mask": None}
    if not ground_only:
        features["synthetic"] = model.aerial_features(present(seen.synthetic))
        features["mask"] = model.mask_features(present(seen.synthetic_mask))
    tile_proj = model.project_tiles(seen.aerial)
    first, second = (joint_scores(m, m.fuse(**features), tile_proj) for m in (model, heads))
    assert torch.equal(first, second)
    assert torch.equal(model.shortlist_embedding(tile_proj), heads.shortlist_embedding(tile_proj))


@pytest.mark.parametrize("load", [Matcher.load, load_fusion])
def test_model_directory_absent_is_refused_with_advice(tmp_path, load):
    with pytest.raises(ValueError, match=r"cvmatch train-matcher published\), found none"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [Matcher.load, load_fusion])
def test_model_of_an_older_format_is_refused(tmp_path, load):
    network().save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 1}))
    with pytest.raises(ValueError, match="format 1, this version reads 3"):
        load(str(tmp_path))


def test_model_of_another_preprocessing_is_refused(tmp_path):
    network(preprocess="opencv-linear-0").save(str(tmp_path))
    with pytest.raises(ValueError, match=rf"opencv-linear-0.*{images.PREPROCESS}"):
        Matcher.load(str(tmp_path))
