import os
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from cvmatch.data import images, schema
from cvmatch.index import reader, shard
from cvmatch.index.build import publish
from cvmatch.index.reader import Index, rank
from cvmatch.index.settings import BuildIndex, DeleteTiles
from cvmatch.index.shard import ShardedArray
from cvmatch.index.update import delete
from cvmatch.match.fusion import Query
from cvmatch.match.model import Matcher, fingerprint_parts
from cvmatch.runtime import hardware
from tests.helpers import index as tiny

COUNT = 24


@torch.inference_mode()
def unsplit(index, query):
    """Scores by FFN_C([a; c]) as one network, each tile from its picture."""
    model, rows = Matcher.load(index.matcher_dir), tiny.rows(COUNT)

    def features(column):
        pixels = np.stack([images.decode(data) for data in rows[column].to_pylist()])
        return model.aerial_features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)

    c, a = features(schema.AERIAL), features(schema.SYNTHETIC)[: len(query.query_proj)]
    first = torch.cat([model.query_aerial_linear.weight, model.tile_linear.weight], dim=1)
    both = torch.cat([a[:, None].expand(-1, COUNT, -1), c.expand(len(a), -1, -1)], dim=2)
    hidden = F.linear(both, first, model.query_aerial_linear.bias)
    rest = model.candidate_mlp
    last = hidden + rest.last(rest.middle(hidden.relu()).relu())
    return (F.normalize(last, dim=2) * query.embedding[:, None]).sum(2)


def test_open_moved_directory_without_its_model_directory_still_answers(tmp_path):
    tiny.index(str(tmp_path))
    shutil.rmtree(tmp_path / "model")
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    opened = Index.open(str(tmp_path / "elsewhere"))
    query = Query(torch.eye(16)[:1], torch.zeros(1, 16))
    assert torch.cat(list(opened.iter_scores(query)), dim=1).shape == (1, 24)
    assert opened.matcher.training is False


def test_process_that_opens_an_index_imports_no_ray_and_no_torchvision():
    # Together 140 MiB and two seconds of each search process.
    script = "import sys, cvmatch.index.reader; print({'ray', 'torchvision'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


def test_open_other_model_is_refused_with_both_fingerprints(model, parts, output, tmp_path):
    info = publish(parts["twelve"], BuildIndex(model=model, output=output))
    other = tiny.matcher(str(tmp_path / "other"), seed=1)
    with pytest.raises(ValueError, match=rf"(?s){info.model}.*got [0-9a-f]{{64}}.*build-index"):
        Index.open(output, model=other)


def test_open_truncated_projections_are_refused_and_a_new_build_mends_it(model, parts, output):
    info = publish(parts["twelve"], BuildIndex(model=model, output=output))
    path = os.path.join(output, "shards", info.shards[0].sha, "tile_projections.npy")
    os.truncate(path, os.path.getsize(path) - 2)
    with pytest.raises(
        ValueError, match=r"tile_projections\.npy is damaged: expected .* got .*build-index"
    ):
        Index.open(output)
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    assert len(Index.open(output, deep=True)) == 12


@pytest.mark.parametrize(
    "kind", ["tiles.arrow", "tile_projections.npy", ".faiss", "model.safetensors"]
)
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
    publish(parts["all"], BuildIndex(model=model, output=output, shortlist=4))
    index = Index.open(output)
    near = index.find_nearest(tiny.queries(1), 24)[0]
    names = index.tiles[schema.PAIR_ID].take(pa.array(near)).to_pylist()
    delete(DeleteTiles(output=output, ids=tuple(names[:9])))
    index = Index.open(output)
    np.testing.assert_array_equal(index.find_nearest(tiny.queries(1)), [near[9:13]])
    assert (index.find_nearest(tiny.queries()) >= 0).all()
    # Fewer than asked are left: all of them, and nothing behind.
    np.testing.assert_array_equal(index.find_nearest(tiny.queries(1), 20), [[*near[9:], *[-1] * 5]])


def test_shortlist_of_lists_that_hold_few_live_tiles_ends(model, parts, output):
    key = {"key": "IVF4,Flat", "nprobe": 1, "shortlist": 6}
    publish(parts["all"], BuildIndex(model=model, output=output, **key))
    whole = Index.open(output).find_nearest(tiny.queries(), 24)
    delete(DeleteTiles(output=output, ids=tuple(f"{number:07d}" for number in range(20))))
    live = [[row for row in own if row >= 20] for own in whole]
    found = Index.open(output).find_nearest(tiny.queries(), 6)
    assert [[row for row in own if row >= 0] for own in found] == live


def test_fingerprint_names_the_part_that_changed(model, tmp_path):
    own = fingerprint_parts(model)
    changes = {"tile": "tile_linear", "tail": "candidate_mlp.last", "query": "query_linear"}
    for part, name in changes.items():
        net = Matcher.load(model)
        net.get_parameter(f"{name}.weight").data += 1
        net.save(str(tmp_path / part))
        found = fingerprint_parts(str(tmp_path / part))
        assert {key for key in own if own[key] != found[key]} == {part}


def test_open_with_a_model_of_the_same_tower_says_that_no_tile_is_embedded_again(
    model, parts, output, tmp_path
):
    publish(parts["first"], BuildIndex(model=model, output=output))
    net = Matcher.load(model)
    net.candidate_mlp.last.weight.data += 1
    net.save(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"\['tail'\].*no tile is embedded again.*build-index"):
        Index.open(output, model=str(tmp_path / "other"))


def test_rank_exact_equals_the_unsplit_network_over_all_tiles(index, query):
    brute = unsplit(index, query)
    ranked = rank(index, query, top_k=COUNT, mode="exact")
    assert sorted(ranked.rows[0]) == list(range(COUNT))
    own = np.take_along_axis(brute.numpy(), ranked.rows, 1)
    np.testing.assert_allclose(
        ranked.scores, own, atol=2e-3
    )  # tile_proj is stored in half precision
    assert (np.diff(ranked.scores) <= 0).all()
    assert np.ptp(brute.numpy(), axis=1).min() > 0.02  # the scores do tell tiles apart


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_rank_exact_in_bf16_gives_the_best_of_fp32(index, query, monkeypatch, spread):
    monkeypatch.setattr(hardware, "fastest_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(reader, "_SPARE", 8)
    centre = index.tile_proj.take(np.arange(COUNT)).astype(np.float32).mean(axis=0)
    noise = np.random.default_rng(0).normal(size=(400, len(centre)))
    # With the small spread, bf16 cannot tell the tiles apart.
    tile_proj = (centre + spread * noise).astype(np.float16)
    many = Index(**{**vars(index), "tile_proj": ShardedArray([tile_proj])})
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
    for row in range(len(query.query_proj)):
        expected = near[row][np.argsort(-scores[row, near[row]])][:3]
        np.testing.assert_array_equal(ranked.rows[row], expected)
    np.testing.assert_allclose(ranked.scores, np.take_along_axis(scores, ranked.rows, 1), atol=1e-5)


def test_rank_of_a_gallery_in_pieces_equals_the_whole(index, query, monkeypatch):
    whole = rank(index, query, top_k=10, mode="exact")
    monkeypatch.setattr(shard, "CHUNK", 7)
    pieces = rank(index, query, top_k=10, mode="exact")
    np.testing.assert_allclose(pieces.scores, whole.scores, atol=1e-5)
    assert (pieces.rows == whole.rows).mean() > 0.95


def test_rank_auto_of_a_large_gallery_is_two_stage(index, query, monkeypatch):
    exact = rank(index, query, 5, shortlist=5)
    monkeypatch.setattr(reader, "MAX_EXACT_TILES", COUNT - 1)
    staged = rank(index, query, 5, shortlist=5)
    np.testing.assert_array_equal(np.sort(staged.rows), np.sort(index.find_nearest(query, 5)))
    assert (np.sort(staged.rows) != np.sort(exact.rows)).any()


def test_rank_more_than_there_are_gives_all(index, query):
    for mode in ("exact", "two-stage"):
        assert rank(index, query, top_k=100, mode=mode).rows.shape == (len(query.query_proj), COUNT)


def test_rank_of_lists_with_too_few_tiles_marks_the_end(tmp_path):
    model = tiny.matcher(str(tmp_path / "model"))
    parts = tiny.parts(tiny.rows(COUNT), model, str(tmp_path / "parts"))
    config = BuildIndex(model=model, output=str(tmp_path / "index"), key="IVF8,Flat", nprobe=1)
    publish(parts, config)
    index = Index.open(config.output)
    (part,) = index.ann
    assert isinstance(part.index, faiss.IndexIVF)
    assert part.index.nprobe == 1
    ranked = rank(index, Query(torch.eye(16)[:2], torch.zeros(2, 16)), COUNT, "two-stage")
    ends = (ranked.rows == -1).sum(1)
    assert (ends > 0).all()
    for rows, scores, end in zip(ranked.rows, ranked.scores, ends, strict=True):
        assert (rows[: COUNT - end] >= 0).all()
        assert np.isinf(scores[COUNT - end :]).all()


@pytest.mark.parametrize("mode", ["exact", "two-stage"])
def test_rank_equal_tiles_are_ordered_by_row(index, query, mode):
    same = Index(
        **{**vars(index), "tile_proj": ShardedArray([index.tile_proj.take(np.zeros(COUNT, int))])}
    )
    ranked = rank(same, query, top_k=COUNT, mode=mode)
    assert np.ptp(ranked.scores, axis=1).max() < 1e-6
    order = np.lexsort((ranked.rows, -ranked.scores))
    assert (order == np.arange(COUNT)).all()


def test_rank_cut_between_equal_tiles_takes_the_first_rows(index, query):
    many = 1000
    same = Index(
        **{**vars(index), "tile_proj": ShardedArray([index.tile_proj.take(np.arange(many) % 2)])}
    )
    whole = rank(same, query, top_k=many, mode="exact")
    for few in (1, 3, COUNT):
        part = rank(same, query, top_k=few, mode="exact")
        assert (part.rows == whole.rows[:, :few]).all()
        assert (part.scores == whole.scores[:, :few]).all()
