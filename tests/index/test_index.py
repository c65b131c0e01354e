import dataclasses
import glob
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch

from cvmatch import config as configs
from cvmatch.data import schema
from cvmatch.index import ann, versions
from cvmatch.index.build import build, publish
from cvmatch.index.quality import recall
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from cvmatch.match.fusion import Query
from cvmatch.match.infer import EmbedQuery, EmbedTile
from tests.helpers import index as tiny

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.matcher(str(tmp_path_factory.mktemp("matcher")))


@pytest.fixture(scope="module")
def parts(model, tmp_path_factory):
    return tiny.parts(tiny.rows(12), model, str(tmp_path_factory.mktemp("parts") / "p"))


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "index")


def table(ids, tile_proj, errors=None):
    return pa.table(
        {
            schema.PAIR_ID: ids,
            "tile_proj": pa.FixedSizeListArray.from_arrays(
                pa.array(np.ravel(tile_proj).astype(np.float32)), 16
            ),
            schema.ERROR: pa.array(errors or [None] * len(ids), pa.string()),
        }
    )


def test_publish_rows_in_any_order_stores_each_u_under_its_own_id(model, parts, output):
    publish(parts, BuildIndex(model=model, output=output))
    opened = Index.open(output, model=model, deep=True)
    embedded = EmbedTile(model, 8)(tiny.columns(tiny.rows(12)))
    assert opened.tiles[schema.PAIR_ID].to_pylist() == list(embedded[schema.PAIR_ID])
    (tile_proj,) = opened.tile_proj.arrays
    np.testing.assert_array_equal(tile_proj, embedded["tile_proj"])
    assert tile_proj.dtype == np.float16
    assert not tile_proj.flags.writeable
    assert opened.tiles[schema.LATITUDE].to_pylist() == [0.01 * number for number in range(12)]


def test_open_moved_directory_without_its_model_directory_still_answers(tmp_path):
    tiny.index(str(tmp_path))
    shutil.rmtree(tmp_path / "model")
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    opened = Index.open(str(tmp_path / "elsewhere"))
    query = Query(torch.eye(16)[:1], torch.zeros(1, 16))
    assert torch.cat(list(opened.scores(query)), dim=1).shape == (1, 24)
    assert opened.matcher.training is False


def test_process_that_opens_an_index_imports_no_ray_and_no_torchvision():
    # Together 140 MiB and two seconds of each search process.
    script = "import sys, cvmatch.index.ranking; print({'ray', 'torchvision'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


def test_publish_interrupted_at_every_rename_keeps_the_old_version(
    model, parts, output, tmp_path, monkeypatch
):
    publish(parts, BuildIndex(model=model, output=output))
    other = tiny.matcher(str(tmp_path / "other"), seed=1)
    more = tiny.parts(tiny.rows(15, seed=1), other, str(tmp_path / "more"))
    rename, failed, calls = os.replace, [], []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 1 + len(failed):
            failed.append(os.path.basename(target))
            raise OSError("power cut")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for trial in range(20):
        place = shutil.copytree(output, tmp_path / f"trial{trial}")
        calls.clear()
        try:
            publish(more, BuildIndex(model=other, output=str(place)))
        except OSError as error:
            assert str(error) == "power cut"  # noqa: PT017
        else:
            break
        assert len(Index.open(str(place), model=model, deep=True)) == 12
        assert not [name for name in os.listdir(place) if name.startswith(".aside")]
    assert len(Index.open(str(place), model=other, deep=True)) == 15
    # heads, shard.json, shard, codes, ann, and these; the shortlist head is the same in both.
    assert len(failed) == 8
    assert failed[-3:] == ["rejected.jsonl", "manifest.json", "CURRENT"]


def test_reader_while_a_new_version_is_published_keeps_its_own(model, parts, output, tmp_path):
    publish(parts, BuildIndex(model=model, output=output))
    reader = Index.open(output)
    before = np.array(reader.tile_proj.arrays[0])
    more = tiny.parts(tiny.rows(15, seed=1), model, str(tmp_path / "more"))
    info = publish(more, BuildIndex(model=model, output=output))
    assert (info["version"], info["parent"]) == ("v000002", "v000001")
    np.testing.assert_array_equal(reader.tile_proj.arrays[0], before)
    assert len(Index.open(output)) == 15
    assert len(Index.open(output, version="v000001")) == 12


def test_publish_same_rows_again_shares_the_files(model, parts, output):
    publish(parts, BuildIndex(model=model, output=output))
    publish(parts, BuildIndex(model=model, output=output))
    assert len(os.listdir(os.path.join(output, "shards"))) == 1
    assert len(os.listdir(os.path.join(output, "heads"))) == 1
    assert len(os.listdir(os.path.join(output, "versions"))) == 2


def test_open_other_model_is_refused_with_both_fingerprints(model, parts, output, tmp_path):
    info = publish(parts, BuildIndex(model=model, output=output))
    other = tiny.matcher(str(tmp_path / "other"), seed=1)
    with pytest.raises(ValueError, match=rf"(?s){info['model']}.*got [0-9a-f]{{64}}.*build_index"):
        Index.open(output, model=other)


def test_open_truncated_u_is_refused_and_a_new_build_mends_it(model, parts, output):
    info = publish(parts, BuildIndex(model=model, output=output))
    path = os.path.join(output, "shards", info["shards"][0]["sha"], "u.npy")
    os.truncate(path, os.path.getsize(path) - 2)
    with pytest.raises(ValueError, match=r"u\.npy is damaged: expected .* got .*build_index"):
        Index.open(output)
    publish(parts, BuildIndex(model=model, output=output))
    assert len(Index.open(output, deep=True)) == 12


@pytest.mark.parametrize("kind", ["tiles.arrow", "u.npy", ".faiss", "model.safetensors"])
def test_open_changed_file_of_the_same_size_is_refused(model, parts, output, kind):
    info = publish(parts, BuildIndex(model=model, output=output))
    name = next(name for name in info["files"] if name.endswith(kind))
    with open(os.path.join(output, name), "r+b") as file:
        file.seek(-3, os.SEEK_END)
        last = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match=f"{kind} is damaged"):
        Index.open(output)


def test_check_large_changed_file_is_found_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "SMALL", 3)
    (tmp_path / "file").write_bytes(b"good")
    files = versions.files_of(str(tmp_path / "file"), "file")
    (tmp_path / "file").write_bytes(b"evil")
    versions.check(str(tmp_path), files)
    with pytest.raises(ValueError, match="file is damaged"):
        versions.check(str(tmp_path), files, deep=True)


def test_open_changed_manifest_or_missing_file_is_refused(model, parts, output):
    info = publish(parts, BuildIndex(model=model, output=output))
    path = os.path.join(output, "versions", "v000001", "manifest.json")
    changed = json.dumps(info | {"rows": 11})
    versions.write(path, changed.encode())
    with pytest.raises(ValueError, match="the manifest was changed"):
        Index.open(output)
    versions.write(path, json.dumps(info).encode())
    os.remove(os.path.join(output, info["ann"]["parts"][0]["file"]))
    with pytest.raises(FileNotFoundError, match=r"ann/.*\.faiss is missing"):
        Index.open(output)


def test_open_nothing_or_unknown_version_says_how_to_build(model, parts, output):
    with pytest.raises(FileNotFoundError, match=r"no index.*build_index"):
        Index.open(output)
    publish(parts, BuildIndex(model=model, output=output))
    with pytest.raises(FileNotFoundError, match=r"v000007, found \['v000001'\]"):
        Index.open(output, version="v000007")


def test_publish_failed_rows_are_listed_and_left_out(model, output, tmp_path):
    done = table(["c", "a", "b"], np.ones((3, 16)), [None, "cannot be decoded", None])
    found = tiny.write_parts(done, str(tmp_path / "parts"))
    config = BuildIndex(model=model, output=output, max_rejected=0.4)
    info = publish(found, config)
    assert (info["rows"], info["rejected"]) == (2, 1)
    with open(os.path.join(output, "versions", "v000001", "rejected.jsonl")) as file:
        assert [json.loads(line) for line in file] == [
            {"pair_id": "a", "error": "cannot be decoded"}
        ]
    with pytest.raises(ValueError, match=r"of 3 rows at most 30\.0% may fail, but 1 did.*'a'"):
        publish(found, BuildIndex(model=model, output=output, max_rejected=0.3))
    assert Index.open(output).tiles[schema.PAIR_ID].to_pylist() == ["b", "c"]


@pytest.mark.parametrize(
    ("done", "message"),
    [
        (
            table(["a", "b", "a"], np.ones((3, 16))),
            r"got 1 again, such as \['a'",
        ),
        (table(["a", "b"], np.full((2, 16), 1e5)), "not finite in half precision"),
        (table(["a"], np.ones((1, 16)), ["broken"]), "of 1 rows at most 5.0% may fail"),
    ],
)
def test_publish_unusable_rows_are_refused(model, output, tmp_path, done, message):
    found = tiny.write_parts(done, str(tmp_path / "parts"))
    with pytest.raises(ValueError, match=message):
        publish(found, BuildIndex(model=model, output=output))
    assert not os.path.exists(os.path.join(output, "CURRENT"))


def test_publish_u_of_another_width_is_refused(parts, output, tmp_path):
    wide = tiny.matcher(str(tmp_path / "wide"), hidden=20)
    with pytest.raises(ValueError, match="expected tile_proj of 20 numbers a row"):
        publish(parts, BuildIndex(model=wide, output=output))


def test_publish_without_rows_names_the_directory(model, output, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected Parquet files"):
        publish(str(tmp_path), BuildIndex(model=model, output=output))


def test_default_factory_key_by_size_follows_the_table():
    assert [ann.default_factory_key(rows, 256) for rows in (1, 2_000, 2_001, 10**7)] == [
        "Flat", "Flat", "PQ64x4", "PQ64x4",
    ]  # fmt: skip
    assert ann.default_factory_key(10**7 + 1, 256) == "IVF16384,PQ64x4"
    assert ann.default_factory_key(10**8 + 1, 256) == "IVF65536,PQ64x4"
    assert ann.default_factory_key(10**5, 64) == "PQ32x4"
    assert ann.default_factory_key(10**5, 30) == "Flat"


@pytest.mark.parametrize(
    ("key", "kind"),
    [("PQ32x4", faiss.IndexPQFastScan), ("IVF8,PQ32x4", faiss.IndexIVFPQFastScan)],
)
def test_ann_of_coded_vectors_holds_nearest_among_its_best(key, kind):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 64))
    vectors = centres[rng.integers(0, 50, 2_100)] + 0.5 * rng.normal(size=(2_100, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    template = ann.template(key, vectors)
    shards = [ann.encoded(template, [vectors[at : at + 700]]) for at in (0, 700, 1_400)]
    found = ann.merged(template, shards)
    assert isinstance(found, kind)
    assert found.ntotal == 2_100
    if isinstance(found, faiss.IndexIVF):
        found.nprobe = 8
    queries = vectors[:100] + 0.03 * rng.normal(size=(100, 64)).astype(np.float32)
    best = (queries @ vectors.T).argmax(1)
    near = found.search(queries, 20)[1]
    assert (near == best[:, None]).any(1).mean() > 0.95


def test_ann_of_unknown_key_says_which_would_do():
    with pytest.raises(ValueError, match=r"'PQ7x4' does not fit vectors of 16.*--key auto"):
        ann.template("PQ7x4", np.ones((10, 16), np.float32))


def test_recall_measured_at_build_equals_brute_force(model, parts, output, tmp_path):
    queries = tiny.rows(12)
    location = tiny.write(queries, str(tmp_path / "queries"))
    config = BuildIndex(model=model, output=output, queries=location, shortlist=3)
    info = publish(parts, config)
    opened = Index.open(output)
    embedded = EmbedQuery(model, "G+A+S")(tiny.columns(queries))
    query = Query(*(torch.from_numpy(embedded[name]) for name in ("embedding", "query_proj")))
    tile_proj = torch.from_numpy(opened.tile_proj.take(np.arange(12))).float()
    with torch.inference_mode():
        exact = opened.matcher.pair_scores(query, tile_proj).topk(10).indices
        near = (query.embedding @ opened.matcher.shortlist_embedding(tile_proj).T).topk(3).indices
    held = (exact[:, :, None] == near[:, None]).any(2).double()
    assert info["recall"]["top1"] == pytest.approx(held[:, 0].mean().item())
    assert info["recall"]["top10"] == pytest.approx(held.mean().item())
    assert 0 < info["recall"]["top10"] <= 0.3  # three of ten at most
    assert (info["recall"]["shortlist"], info["recall"]["queries"]) == (3, 12)
    whole = recall(Index(**{**vars(opened), "manifest": {"shortlist": 12}}), query)
    assert (whole["top1"], whole["top10"]) == (1.0, 1.0)


def test_recall_of_a_matcher_of_g_alone_needs_no_synthetic_pictures(output, tmp_path):
    model = tiny.matcher(str(tmp_path / "alone"), ground_only=True)
    rows = tiny.rows(12)
    for name in (schema.SYNTHETIC, schema.SYNTHETIC_CLASSES):
        column = rows.column_names.index(name)
        rows = rows.set_column(column, name, pa.nulls(12, pa.binary()))
    config = BuildIndex(
        model=model, output=output, queries=tiny.write(rows, str(tmp_path / "q")), shortlist=12
    )
    info = publish(tiny.parts(rows, model, str(tmp_path / "parts")), config)
    assert (info["recall"]["top1"], info["recall"]["queries"]) == (1.0, 12)


def test_recall_of_queries_without_pictures_is_refused(model, parts, output, tmp_path):
    rows = tiny.rows(12)
    column = rows.column_names.index(schema.SYNTHETIC)
    rows = rows.set_column(column, schema.SYNTHETIC, pa.nulls(12, pa.binary()))
    queries = tiny.write(rows, str(tmp_path / "queries"))
    with pytest.raises(ValueError, match=r"'synthetic'.*got none. Run jobs/synthesize.py"):
        publish(parts, BuildIndex(model=model, output=output, queries=queries))


@pytest.mark.ray
def test_build_through_the_actor_pool_equals_the_model_run_here(
    ray_session, model, output, tmp_path
):
    rows = tiny.rows(30)
    broken = rows[schema.AERIAL].to_pylist()
    broken[4] = broken[4][:40]
    rows = rows.set_column(rows.column_names.index(schema.AERIAL), schema.AERIAL, pa.array(broken))
    location = tiny.write(rows, str(tmp_path / "rows"))
    info = build(BuildIndex(rows=location, model=model, output=output))
    opened = Index.open(output, model=model, deep=True)
    assert (info["rows"], info["rejected"]) == (29, 1)
    expected = EmbedTile(model, 8)(tiny.columns(rows))
    kept = [number for number in range(30) if number != 4]
    assert opened.tiles[schema.PAIR_ID].to_pylist() == list(expected[schema.PAIR_ID][kept])
    np.testing.assert_allclose(
        opened.tile_proj.take(np.arange(29)), expected["tile_proj"][kept], atol=1e-2
    )
    rejected = os.path.join(output, "versions", "v000001", "rejected.jsonl")
    with open(rejected) as file:
        assert json.loads(file.read())["pair_id"] == "0000004"
    assert os.listdir(os.path.join(output, "building")) == []


@pytest.mark.ray
def test_build_needs_no_more_of_its_rows_than_ids_and_pictures(
    ray_session, model, output, tmp_path
):
    rows = tiny.rows(8)
    location = tiny.write(rows.select([schema.PAIR_ID, schema.AERIAL]), str(tmp_path / "rows"))
    assert build(BuildIndex(rows=location, model=model, output=output))["rows"] == 8
    tiles = Index.open(output).tiles
    assert tiles[schema.PAIR_ID].to_pylist() == rows[schema.PAIR_ID].to_pylist()
    assert tiles[schema.LATITUDE].null_count == 8
    ids = tiny.write(rows.select([schema.PAIR_ID]), str(tmp_path / "ids"))
    with pytest.raises(ValueError, match=r"expected columns \['aerial'\], got only \['pair_id'\]"):
        build(BuildIndex(rows=ids, model=model, output=f"{output}-none"))


def test_shard_names_its_files_and_maker(model, parts, output):
    info = publish(parts, BuildIndex(model=model, output=output))
    folder = os.path.join(output, "shards", info["shards"][0]["sha"])
    with open(os.path.join(folder, "shard.json")) as file:
        about = json.load(file)
    assert (about["rows"], about["maker"]) == (12, {"tile": info["parts"]["tile"]})
    assert os.path.getsize(os.path.join(folder, "u.npy")) % 64 == 12 * 16 * 2 % 64  # aligned


@pytest.mark.slow
@pytest.mark.ray
def test_build_that_was_killed_goes_on_and_ends_in_the_same_files(ray_session, model, tmp_path):
    location = tiny.write(tiny.rows(400), str(tmp_path / "rows"))
    pool = "--pool.batch 8 --shard-rows 150 --key PQ8x4"
    command = f"{sys.executable} {JOBS}/build_index.py --rows {location} --model {model} {pool}"
    killed = str(tmp_path / "killed")
    parts = glob.glob(f"{killed}/building/*/parts/*.parquet")
    with subprocess.Popen(f"{command} --output {killed}".split(), stderr=subprocess.DEVNULL) as job:
        while not parts and job.poll() is None:
            time.sleep(0.01)
            parts = glob.glob(f"{killed}/building/*/parts/*.parquet")
        job.kill()
    assert not os.path.exists(f"{killed}/CURRENT")
    config = configs.parse(BuildIndex, f"--rows {location} --model {model} {pool}".split())
    infos = [
        build(dataclasses.replace(config, output=place)) for place in (killed, f"{killed}-never")
    ]
    files = [
        {name: one for name, one in info["files"].items() if not name.startswith("versions/")}
        for info in infos
    ]
    assert files[0] == files[1]
    assert infos[0]["rows"] == 400
