import dataclasses

import numpy as np
import pytest
import torch

from cvmatch.index import build, shortlist_head
from cvmatch.index.build import publish
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from cvmatch.match.fusion import Query
from cvmatch.match.model import Matcher
from cvmatch.match.scoring import joint_scores
from tests.helpers import index as tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.matcher(str(tmp_path_factory.mktemp("matcher")))


def gallery(count, seed):
    return (np.random.default_rng(seed).normal(size=(count, 16)) * 2).astype(np.float16)


def queries(count, seed):
    random = torch.Generator().manual_seed(seed)
    embedding = torch.nn.functional.normalize(torch.randn(count, 16, generator=random), dim=1)
    return Query(embedding, 2 * torch.randn(count, 16, generator=random))


def held(model, head, query, tile_proj, count):
    """Share of the joint's best tiles among the head's best `count`."""
    best = joint_scores(model, query, tile_proj).argmax(1)
    with torch.inference_mode():
        near = (head.query(query) @ head.tile(tile_proj.float()).T).topk(count).indices
    return (near == best[:, None]).any(1).double().mean().item()


def test_distilled_head_ranks_unseen_tiles_for_unseen_queries_as_the_joint_does(model, tmp_path):
    net = Matcher.load(model)
    head = shortlist_head.distil(net, queries(400, 0), gallery(3_000, 1), steps=300)
    tile_proj, asked = torch.from_numpy(gallery(2_000, 2)), queries(100, 3)
    assert held(net, shortlist_head.Distilled(16), asked, tile_proj, 50) < 0.3
    assert held(net, head, asked, tile_proj, 50) > 0.9
    head.save(str(tmp_path))
    again = shortlist_head.load(str(tmp_path), net)
    torch.testing.assert_close(again.query(asked), head.query(asked))
    torch.testing.assert_close(again.tile(tile_proj.float()), head.tile(tile_proj.float()))


def test_distillation_repeats_itself(model):
    net = Matcher.load(model)
    one, other = (
        shortlist_head.distil(net, queries(50, 0), gallery(200, 1), steps=5).state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_build_with_a_distilled_head_measures_other_queries_and_answers(model, tmp_path):
    rows = tiny.rows(24)
    config = BuildIndex(
        model=model, output=str(tmp_path / "index"), queries=tiny.write(rows, str(tmp_path / "q")),
        head="distilled", steps=20, sample=6, shortlist=24, shard_rows=10,
    )  # fmt: skip
    info = publish(tiny.parts(rows, model, str(tmp_path / "parts")), config)
    assert (info["recall"]["queries"], info["recall"]["top10"]) == (6, 1.0)
    index = Index.open(config.output, deep=True)
    assert isinstance(index.head, shortlist_head.Distilled)
    assert index.ann[0].index.d == shortlist_head.WIDTH
    assert sorted(index.nearest(queries(1, 0))[0]) == list(range(24))


def test_distilled_head_without_queries_is_refused(model, tmp_path):
    parts = tiny.parts(tiny.rows(4), model, str(tmp_path / "parts"))
    config = BuildIndex(model=model, output=str(tmp_path / "index"), head="distilled")
    with pytest.raises(ValueError, match="pass --queries"):
        publish(parts, config)


def test_build_takes_a_distilled_head_only_where_its_own_holds_too_little(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "EXHAUSTIVE", 10)
    rows = tiny.rows(24)
    config = BuildIndex(
        model=model, output=str(tmp_path / "index"), queries=tiny.write(rows, str(tmp_path / "q")),
        steps=2, sample=8, shortlist=24,
    )  # fmt: skip
    parts = tiny.parts(rows, model, str(tmp_path / "parts"))
    enough = publish(parts, config)  # all tiles are in the shortlist
    assert (enough["head"], "discarded" in enough["seconds"]) == ("own", False)
    few = publish(parts, dataclasses.replace(config, shortlist=1))
    assert few["recall"]["top10"] <= 0.1  # one of ten at most, with either head
    assert few["seconds"]["discarded"] > 0
    assert len(Index.open(config.output, deep=True).nearest(queries(1, 0))[0]) == 1
