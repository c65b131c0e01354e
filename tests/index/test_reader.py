import os
import shutil
import subprocess
import sys
from dataclasses import replace

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from cvmatch.data import images, schema
from cvmatch.data.schema import QUERY_VECTOR
from cvmatch.index import reader, shard
from cvmatch.index.build import publish
from cvmatch.index.reader import Index, rank, rank_best
from cvmatch.index.settings import BuildIndex, DeleteTiles
from cvmatch.index.shard import ShardedArray
from cvmatch.index.update import delete
from cvmatch.match.heads.branches import FusionWeights
from cvmatch.match.infer import EmbedQuery
from cvmatch.match.model import Matcher, fingerprint_parts
from cvmatch.match.settings import Modality
from cvmatch.runtime import hardware
from tests.helpers import index as tiny
from tests.helpers.matcher import branch_heads

COUNT = 24


def _with_shortlist(index, size):
    return replace(index, manifest=replace(index.manifest, shortlist=size))


@torch.inference_mode()
def brute_force(index: Index, modality: Modality = "G+A") -> torch.Tensor:
    """Weighted sums of cosines of six queries and all tiles, by each branch from the pictures."""
    model, rows = Matcher.load(index.matcher_dir), tiny.rows(COUNT)

    def pictures(column, count):
        pixels = [images.decode(data) for data in rows[column].to_pylist()[:count]]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255

    tile = model.aerial_features(pictures(schema.AERIAL, COUNT))
    feature = {
        "direct": model.ground_features(pictures(schema.GROUND, 6)),
        "aerial": model.aerial_features(pictures(schema.SYNTHETIC, 6)),
    }
    heads = branch_heads(model)
    terms = [
        weight
        * F.cosine_similarity(
            heads.query[name](feature[name])[:, None], heads.tile[name](tile), dim=2
        )
        for name, weight in heads.weights.weights[modality].items()
    ]
    return torch.stack(terms).sum(0)


def test_open_moved_directory_without_its_model_directory_still_answers(tmp_path):
    tiny.index(str(tmp_path))
    shutil.rmtree(tmp_path / "model")
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    opened = Index.open(str(tmp_path / "elsewhere"))
    assert torch.cat(list(opened.iter_scores(torch.eye(16)[:1])), dim=1).shape == (1, 24)


def test_process_that_opens_an_index_imports_no_ray_and_no_torchvision():
    # Together 140 MiB and two seconds of each search process.
    script = "import sys, cvmatch.index.reader; print({'ray', 'torchvision'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


def test_open_model_of_another_tower_is_refused(model, parts, output, tmp_path):
    info = publish(parts["twelve"], BuildIndex(model=model, output=output))
    other = tiny.matcher(str(tmp_path / "other"), seed=1)
    with pytest.raises(ValueError, match=rf"embedded by \w+ .*of {info.tower}.*build-index"):
        Index.open(output, model=other)


def test_open_truncated_projections_are_refused_and_a_new_build_mends_it(model, parts, output):
    info = publish(parts["twelve"], BuildIndex(model=model, output=output))
    path = os.path.join(output, "shards", info.shards[0].sha, "vectors.npy")
    os.truncate(path, os.path.getsize(path) - 2)
    with pytest.raises(ValueError, match=r"vectors\.npy is damaged: expected .* got .*build-index"):
        Index.open(output)
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    assert len(Index.open(output, deep=True)) == 12


@pytest.mark.parametrize("kind", ["tiles.arrow", "vectors.npy", ".faiss", "model.safetensors"])
def test_open_changed_file_of_the_same_size_is_refused(model, parts, output, kind):
    info = publish(parts["twelve"], BuildIndex(model=model, output=output))
    name = next(name for name in info.files if name.endswith(kind))
    with open(os.path.join(output, name), "r+b") as file:
        file.seek(-3, os.SEEK_END)
        last = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match=f"{kind} is damaged"):
        Index.open(output)


def test_open_nothing_or_unknown_version_says_how_to_build(model, parts, output):
    with pytest.raises(FileNotFoundError, match=r"no index.*build-index"):
        Index.open(output)
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    with pytest.raises(FileNotFoundError, match=r"v000007, found \['v000001'\]"):
        Index.open(output, version="v000007")


def test_shortlist_is_full_although_the_nearest_tiles_were_deleted(model, parts, output):
    publish(parts["all"], BuildIndex(model=model, output=output))
    index = _with_shortlist(Index.open(output), 4)
    near = index.find_nearest(tiny.queries(1), 24)[0]
    names = index.tiles[schema.PAIR_ID].take(pa.array(near)).to_pylist()
    delete(DeleteTiles(output=output, ids=tuple(names[:9])))
    index = _with_shortlist(Index.open(output), 4)
    np.testing.assert_array_equal(index.find_nearest(tiny.queries(1)), [near[9:13]])
    assert (index.find_nearest(tiny.queries()) >= 0).all()
    # Fewer than asked are left: all of them, and nothing behind.
    np.testing.assert_array_equal(index.find_nearest(tiny.queries(1), 20), [[*near[9:], *[-1] * 5]])


def test_shortlist_of_lists_that_hold_few_live_tiles_ends(model, parts, output):
    key = {"key": "IVF4,Flat", "nprobe": 1}
    publish(parts["all"], BuildIndex(model=model, output=output, **key))
    whole = Index.open(output).find_nearest(tiny.queries(), 24)
    delete(DeleteTiles(output=output, ids=tuple(f"{number:07d}" for number in range(20))))
    live = [[row for row in own if row >= 20] for own in whole]
    found = Index.open(output).find_nearest(tiny.queries(), 6)
    assert [[row for row in own if row >= 0] for own in found] == live


@pytest.mark.parametrize(
    ("part", "name"),
    [("tile", "heads.tile.aerial.0.weight"), ("query", "heads.query.direct.0.weight")],
)
def test_fingerprint_names_the_part_that_changed(model, tmp_path, part, name):
    own = fingerprint_parts(model)
    net = Matcher.load(model)
    net.get_parameter(name).data += 1
    net.save(str(tmp_path))
    found = fingerprint_parts(str(tmp_path))
    assert {key for key in own if own[key] != found[key]} == {part}


def test_open_takes_a_model_of_the_same_tile_tower_with_other_weights(
    model, parts, output, tmp_path
):
    publish(parts["first"], BuildIndex(model=model, output=output))
    net = Matcher.load(model)
    branch_heads(net).weights = FusionWeights.normalised({"direct": 1.0, "aerial": 3.0})
    net.save(str(tmp_path / "other"))
    own, found = fingerprint_parts(model), fingerprint_parts(str(tmp_path / "other"))
    assert (own["tile"] == found["tile"], own["query"] == found["query"]) == (True, False)
    assert len(Index.open(output, model=str(tmp_path / "other"))) == 16


def test_rank_exact_equals_the_sum_of_the_branches_cosines_over_all_tiles(index, query):
    brute = brute_force(index)
    ranked = rank(index, query, top_k=COUNT, mode="exact")
    assert sorted(ranked.rows[0]) == list(range(COUNT))
    own = np.take_along_axis(brute.numpy(), ranked.rows, 1)
    np.testing.assert_allclose(ranked.scores, own, atol=2e-3)  # stored in half precision
    assert (np.diff(ranked.scores) <= 0).all()
    assert np.ptp(brute.numpy(), axis=1).min() > 0.02  # the scores do tell tiles apart


@pytest.mark.parametrize("queries", [1, 3, 6])  # few: float16
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_rank_exact_in_half_precision_gives_the_best_of_fp32(
    index, query, monkeypatch, spread, queries
):
    query = query[:queries]
    monkeypatch.setattr(hardware, "fastest_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(reader, "_SPARE", 8)
    centre = index.vectors.take(np.arange(COUNT)).astype(np.float32).mean(axis=0)
    noise = np.random.default_rng(0).normal(size=(400, len(centre)))
    # With the small spread, half precision cannot tell the tiles apart.
    vectors = (centre + spread * noise).astype(np.float16)
    many = Index(**{**vars(index), "vectors": ShardedArray([vectors])})
    expected = torch.cat(list(many.iter_scores(query)), dim=1).topk(2)
    ranked = rank(many, query, top_k=2, mode="exact")
    np.testing.assert_allclose(ranked.scores, expected.values, atol=1e-6)


def test_rank_two_stage_over_all_tiles_equals_exact(index, query):
    exact = rank(index, query, top_k=10, mode="exact")
    staged = rank(index, query, top_k=10, mode="two-stage", shortlist=COUNT)
    np.testing.assert_allclose(staged.scores, exact.scores, atol=1e-5)
    assert (staged.rows == exact.rows).mean() > 0.95  # but for ties within rounding


def test_rank_two_stage_gives_exact_scores_of_the_shortlist_alone(index, query):
    ranked = rank(index, query, top_k=3, mode="two-stage", shortlist=5)
    near = index.find_nearest(query, 5)
    scores = torch.cat(list(index.iter_scores(query)), dim=1).numpy()
    for row in range(len(query)):
        expected = near[row][np.argsort(-scores[row, near[row]])][:3]
        np.testing.assert_array_equal(ranked.rows[row], expected)
    np.testing.assert_allclose(ranked.scores, np.take_along_axis(scores, ranked.rows, 1), atol=1e-5)


def test_rank_of_a_gallery_in_pieces_equals_the_whole(index, query, monkeypatch):
    whole = rank(index, query, top_k=10, mode="exact")
    monkeypatch.setattr(shard, "CHUNK", 7)
    pieces = rank(index, query, top_k=10, mode="exact")
    np.testing.assert_allclose(pieces.scores, whole.scores, atol=1e-5)
    assert (pieces.rows == whole.rows).mean() > 0.95


def test_rank_auto_of_a_large_gallery_is_two_stage(tmp_path, monkeypatch):
    index = tiny.index(str(tmp_path), score="joint")
    embedded = EmbedQuery(index.matcher_dir, "G+A+S")(tiny.columns(tiny.rows(6)))
    query = torch.from_numpy(embedded[QUERY_VECTOR])
    exact = rank(index, query, 5, shortlist=5)
    monkeypatch.setattr(reader, "MAX_EXACT_TILES", COUNT - 1)
    staged = rank(index, query, 5, shortlist=5)
    np.testing.assert_array_equal(np.sort(staged.rows), np.sort(index.find_nearest(query, 5)))
    assert (np.sort(staged.rows) != np.sort(exact.rows)).any()


def test_rank_more_than_there_are_gives_all(index, query):
    for mode in ("exact", "two-stage"):
        assert rank(index, query, top_k=100, mode=mode).rows.shape == (len(query), COUNT)


def test_rank_of_lists_with_too_few_tiles_marks_the_end(tmp_path):
    model = tiny.matcher(str(tmp_path / "model"))
    parts = tiny.parts(tiny.rows(COUNT), model, str(tmp_path / "parts"))
    config = BuildIndex(model=model, output=str(tmp_path / "index"), key="IVF8,Flat", nprobe=1)
    publish(parts, config)
    index = Index.open(config.output)
    (part,) = index.ann
    assert isinstance(part.index, faiss.IndexIVF)
    assert part.index.nprobe == 1
    ranked = rank(index, torch.eye(16)[:2], COUNT, "two-stage")
    ends = (ranked.rows == -1).sum(1)
    assert (ends > 0).all()
    for rows, scores, end in zip(ranked.rows, ranked.scores, ends, strict=True):
        assert (rows[: COUNT - end] >= 0).all()
        assert np.isinf(scores[COUNT - end :]).all()


@pytest.mark.parametrize("mode", ["exact", "two-stage"])
def test_rank_equal_tiles_are_ordered_by_row(index, query, mode):
    same = Index(
        **{**vars(index), "vectors": ShardedArray([index.vectors.take(np.zeros(COUNT, int))])}
    )
    ranked = rank(same, query, top_k=COUNT, mode=mode)
    assert np.ptp(ranked.scores, axis=1).max() < 1e-6
    order = np.lexsort((ranked.rows, -ranked.scores))
    assert (order == np.arange(COUNT)).all()


def test_rank_cut_between_equal_tiles_takes_the_first_rows(index, query):
    many = 1000
    same = Index(
        **{**vars(index), "vectors": ShardedArray([index.vectors.take(np.arange(many) % 2)])}
    )
    whole = rank(same, query, top_k=many, mode="exact")
    for few in (1, 3, COUNT):
        part = rank(same, query, top_k=few, mode="exact")
        assert (part.rows == whole.rows[:, :few]).all()
        # Products of other sizes may differ in their last bits.
        assert part.scores == pytest.approx(whole.scores[:, :few], abs=1e-6)


def test_rank_best_takes_of_each_tile_the_best_vector_of_a_query(index, query):
    tiles, vectors = rank_best(index, query, 5)
    scores = np.full((len(query), len(index)), -np.inf)
    for number in range(len(query)):
        found = rank(index, query[number : number + 1], len(index), "exact")
        known = found.rows[0] >= 0
        scores[number, found.rows[0][known]] = found.scores[0][known]
    best = np.argsort(-scores.max(axis=0), kind="stable")[:5]
    assert tiles.rows.tolist() == [best.tolist()]
    np.testing.assert_allclose(tiles.scores[0], scores.max(axis=0)[best], atol=1e-6)
    assert vectors[0].tolist() == scores[:, best].argmax(axis=0).tolist()
