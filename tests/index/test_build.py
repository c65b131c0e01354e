import contextlib
import dataclasses
import glob
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from cvmatch import config as configs
from cvmatch.data import schema
from cvmatch.index import build as building
from cvmatch.index import embedding
from cvmatch.index.build import build, compute_recall, publish
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from cvmatch.match.infer import EmbedQuery, EmbedTile
from tests.helpers import index as tiny
from tests.helpers.present import present


def table(ids, vectors, errors=None):
    return pa.table(
        {
            schema.PAIR_ID: ids,
            "tile_vector": pa.FixedSizeListArray.from_arrays(
                pa.array(np.ravel(vectors).astype(np.float32)), 16
            ),
            schema.ERROR: pa.array(errors or [None] * len(ids), pa.string()),
        }
    )


def test_publish_rows_in_any_order_stores_each_projection_under_its_own_id(model, parts, output):
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    opened = Index.open(output, model=model, deep=True)
    embedded = EmbedTile(model, 8)(tiny.columns(tiny.rows(12)))
    assert opened.tiles[schema.PAIR_ID].to_pylist() == list(embedded[schema.PAIR_ID])
    (vectors,) = opened.vectors.arrays
    np.testing.assert_array_equal(vectors, embedded["tile_vector"])
    assert vectors.dtype == np.float16
    assert not vectors.flags.owndata  # memory-mapped
    assert opened.tiles[schema.LATITUDE].to_pylist() == [0.01 * number for number in range(12)]


def test_publish_failed_rows_are_listed_and_left_out(model, output, tmp_path):
    done = table(["c", "a", "b"], np.ones((3, 16)), [None, "cannot be decoded", None])
    found = tiny.write_parts(done, str(tmp_path / "parts"))
    config = BuildIndex(model=model, output=output, max_rejected=0.4)
    info = publish(found, config)
    assert (info.rows, info.rejected) == (2, 1)
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


def test_publish_names_identical_tiles_and_counts_them(model, output, tmp_path, caplog):
    vectors = np.random.default_rng(0).normal(size=(6, 16))
    vectors[[1, 3, 4]] = vectors[1]
    done = table([*"fedcba"], vectors)
    info = publish(tiny.write_parts(done, str(tmp_path / "parts")),
                   BuildIndex(model=model, output=output))  # fmt: skip
    assert info.identical_tiles == 3
    (group,) = info.identical
    assert (group.tiles, group.pair_ids) == (3, ("b", "c", "e"))
    assert "3 of 6 tiles are identical" in caplog.text
    assert Index.open(output).manifest.identical == info.identical


def test_publish_rows_that_nothing_names_are_rejected_with_the_others(model, output, tmp_path):
    found = tiny.write_parts(table(["a", "b"], np.eye(2, 16)), str(tmp_path / "parts"))
    nameless = [{"pair_id": None, "error": "x.parquet row 7: pair_id is null, empty or blank"}]
    config = BuildIndex(model=model, output=output, max_rejected=0.4)
    assert publish(found, config, left_out=nameless).rejected == 1
    with open(os.path.join(output, "versions", "v000001", "rejected.jsonl")) as file:
        assert [json.loads(line) for line in file] == nameless
    with pytest.raises(ValueError, match=r"of 3 rows at most 30\.0% may fail, but 1 did.*row 7"):
        publish(found, dataclasses.replace(config, max_rejected=0.3), left_out=nameless)


def test_publish_projections_of_another_width_is_refused(parts, output, tmp_path):
    wide = tiny.matcher(str(tmp_path / "wide"), hidden=20)
    with pytest.raises(ValueError, match="expected tile_vector of 40 numbers a row"):
        publish(parts["twelve"], BuildIndex(model=wide, output=output))


def test_publish_without_rows_names_the_directory(model, output, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected Parquet files"):
        publish(str(tmp_path), BuildIndex(model=model, output=output))


@pytest.mark.parametrize("score", ["sum", "joint"])
def test_recall_measured_at_build_equals_brute_force(output, tmp_path, score):
    model = tiny.matcher(str(tmp_path / "model"), score=score)
    queries = tiny.rows(12)
    location = tiny.write(queries, str(tmp_path / "queries"))
    parts = tiny.parts(queries, model, str(tmp_path / "parts"))
    publish(parts, BuildIndex(model=model, output=output, queries=location))
    opened = Index.open(output)
    embedded = EmbedQuery(model, "G+A+S" if score == "joint" else "G+A")(tiny.columns(queries))
    query = torch.from_numpy(embedded["query_vector"])
    vectors = torch.from_numpy(opened.vectors.take(np.arange(12))).float()
    exact = torch.cat(list(opened.iter_scores(query)), dim=1).topk(10).indices
    width = opened.scorer.shortlist_width
    near = (query[:, :width] @ vectors[:, :width].T).topk(3).indices
    held = (exact[:, :, None] == near[:, None]).any(2).double()
    few = dataclasses.replace(opened.manifest, shortlist=3)
    recall = compute_recall(dataclasses.replace(opened, manifest=few), query)
    assert recall.top1 == pytest.approx(held[:, 0].mean().item())
    assert recall.top10 == pytest.approx(held.mean().item())
    assert 0 < recall.top10 <= 0.3  # three of ten at most
    assert (recall.shortlist, recall.queries) == (3, 12)
    measured = present(opened.manifest.recall)
    assert (measured.top1, measured.top10) == (1.0, 1.0)


def test_shortlist_is_the_smallest_that_holds_the_recall_asked_for(output, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "MIN_SHORTLIST", 1)
    model = tiny.matcher(str(tmp_path / "model"), score="joint")
    rows = tiny.rows(64)
    location = tiny.write(rows, str(tmp_path / "queries"))
    parts = tiny.parts(rows, model, str(tmp_path / "parts"))
    config = BuildIndex(model=model, output=output, queries=location)
    sizes = []
    for recall in (0.5, 0.8, 1.0):
        info = publish(parts, dataclasses.replace(config, recall=recall))
        assert present(info.recall).top1 >= recall
        sizes.append(info.shortlist)
        half = dataclasses.replace(info, shortlist=info.shortlist // 2)
        opened = dataclasses.replace(Index.open(output), manifest=half)
        query = present(embedding.sample_queries(location, model, 0)).vectors
        less = compute_recall(opened, query)
        assert less.top1 < recall or less.top10 < 2 * recall - 1
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_recall_of_a_matcher_of_g_alone_needs_no_synthetic_pictures(output, tmp_path):
    model = tiny.matcher(str(tmp_path / "alone"), branches=("direct",))
    rows = tiny.rows(12)
    for name in (schema.SYNTHETIC, schema.SYNTHETIC_CLASSES):
        column = rows.column_names.index(name)
        rows = rows.set_column(column, name, pa.nulls(12, pa.binary()))
    config = BuildIndex(model=model, output=output, queries=tiny.write(rows, str(tmp_path / "q")))
    info = publish(tiny.parts(rows, model, str(tmp_path / "parts")), config)
    recall = present(info.recall)
    assert (recall.top1, recall.queries) == (1.0, 12)


def test_build_calibrates_each_modality_on_the_queries_whose_tiles_it_holds(output, tmp_path):
    model = tiny.matcher(str(tmp_path / "model"), branches=("direct", "layout"))
    rows = tiny.rows(60)
    # A that is the tile itself tells places apart, where G of random weights cannot.
    rows = rows.set_column(
        rows.column_names.index(schema.SYNTHETIC), schema.SYNTHETIC, rows[schema.AERIAL]
    )
    queries = tiny.write(rows, str(tmp_path / "queries"))
    parts = tiny.parts(rows.slice(0, 50), model, str(tmp_path / "parts"))
    publish(parts, BuildIndex(model=model, output=output, queries=queries))
    known = Index.open(output).manifest.calibrations
    assert set(known) == {"G", "G+A"}
    assert {one.queries for one in known.values()} == {50}  # ten places are not in the index
    assert known["G+A"].auroc > known["G"].auroc + 0.1


def test_recall_of_queries_without_pictures_is_refused(model, parts, output, tmp_path):
    rows = tiny.rows(12)
    column = rows.column_names.index(schema.SYNTHETIC)
    rows = rows.set_column(column, schema.SYNTHETIC, pa.nulls(12, pa.binary()))
    queries = tiny.write(rows, str(tmp_path / "queries"))
    with pytest.raises(ValueError, match=r"'synthetic'.*got none. Run cvmatch synthesize"):
        publish(parts["twelve"], BuildIndex(model=model, output=output, queries=queries))


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
    assert (info.rows, info.rejected) == (29, 1)
    expected = EmbedTile(model, 8)(tiny.columns(rows))
    kept = [number for number in range(30) if number != 4]
    assert opened.tiles[schema.PAIR_ID].to_pylist() == list(expected[schema.PAIR_ID][kept])
    np.testing.assert_allclose(
        opened.vectors.take(np.arange(29)), expected["tile_vector"][kept], atol=1e-2
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
    assert build(BuildIndex(rows=location, model=model, output=output)).rows == 8
    tiles = Index.open(output).tiles
    assert tiles[schema.PAIR_ID].to_pylist() == rows[schema.PAIR_ID].to_pylist()
    assert tiles[schema.LATITUDE].null_count == 8
    ids = tiny.write(rows.select([schema.PAIR_ID]), str(tmp_path / "ids"))
    with pytest.raises(ValueError, match=r"expected columns \['aerial'\], got only \['pair_id'\]"):
        build(BuildIndex(rows=ids, model=model, output=f"{output}-none"))


KILLED = """
import sys, time
from cvmatch import config
from cvmatch.index import build as building, settings
building.publish = lambda *_, **__: time.sleep(600)  # it is killed before anything is published
building.build(config.parse(settings.BuildIndex, sys.argv[1:]), shard_rows=150)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_build_that_was_killed_goes_on_and_ends_in_the_same_files(ray_session, model, tmp_path):
    location = tiny.write(tiny.rows(400), str(tmp_path / "rows"))
    flags = f"--rows {location} --model {model} --pool.batch 8 --key PQ8x4".split()
    killed = str(tmp_path / "killed")
    command = [sys.executable, "-c", KILLED, *flags, "--output", killed]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as job:
        while not glob.glob(f"{killed}/building/*/parts/*.parquet"):
            assert job.poll() is None, "the build ended before it wrote anything"
            time.sleep(0.01)
        # Its workers too: one that lives on would write rows beside the next build.
        workers = psutil.Process(job.pid).children(recursive=True)
        for process in (job, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(workers, timeout=60)
    assert not os.path.exists(f"{killed}/CURRENT")
    config = configs.parse(BuildIndex, flags)
    infos = [
        build(dataclasses.replace(config, output=output), shard_rows=150)
        for output in (killed, f"{killed}-never")
    ]
    files = [
        {name: one for name, one in info.files.items() if not name.startswith("versions/")}
        for info in infos
    ]
    assert files[0] == files[1]
    assert [info.rows for info in infos] == [400, 400]
