import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cvmatch.data import schema
from cvmatch.evaluate.run import check_unseen, evaluate, find_true_rows, flatten_numbers
from cvmatch.evaluate.settings import Evaluate
from cvmatch.index.settings import DeleteTiles
from cvmatch.index.update import delete
from cvmatch.report.evaluation_page import write_evaluation_page
from tests.helpers import index as tiny
from tests.helpers.present import present

COUNT = 24  # tiles of the index of conftest.py


def test_check_unseen_training_ids_are_refused_with_names_and_number(tmp_path):
    text = "0000003\n0000007\n0000040\n"
    (tmp_path / "training_ids.txt").write_text(text)
    about = {"pairs": 3, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "training.json").write_text(json.dumps(about))
    ids = [f"{number:07d}" for number in range(10)]
    with pytest.raises(ValueError, match=r"trained on 2 of 10 queries.*\['0000003', '0000007'\]"):
        check_unseen(ids, str(tmp_path))
    check_unseen(["0000001"], str(tmp_path))


def test_evaluate_on_training_pairs_is_refused(folder, tmp_path):
    model = tiny.matcher(str(tmp_path / "model"))
    text = "0000003\n"
    (tmp_path / "model" / "training_ids.txt").write_text(text)
    about = {"pairs": 1, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "model" / "training.json").write_text(json.dumps(about))
    parts = tiny.parts(tiny.rows(COUNT), model, str(tmp_path / "parts"))
    tiny.publish(parts, tiny.BuildIndex(model=model, output=str(tmp_path / "index")))
    config = Evaluate(
        queries=os.path.join(folder, "queries"), index=str(tmp_path / "index"),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="trained on 1 of 10 queries, such as"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_find_true_rows_of_tiles_that_the_index_lacks_are_named(index):
    assert find_true_rows(["0000005", "0000000"], index).tolist() == [5, 0]
    with pytest.raises(ValueError, match=r"2 of 3 queries, such as \['0000024', 'x'\]"):
        find_true_rows(["0000024", "0000001", "x"], index)


def test_flatten_numbers_names_are_what_mlflow_takes():
    results = {
        "retrieval": {"360-north": {"G+A": {"recall@1%": 0.5, "nan": math.nan}}},
        "x": "text",
    }
    assert flatten_numbers(results) == {"retrieval/360-north/G_A/recall_1pct": 0.5}


def test_evaluate_writes_results_that_agree_query_by_query(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Evaluate(
        queries=os.path.join(folder, "queries"), index=os.path.join(folder, "index"),
        output=str(tmp_path / "out"), bootstrap=50, near_m=3000.0, fov=(360.0, 90.0),
    )  # fmt: skip
    results = evaluate(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results.to_json()
    table = parquet.read_table(tmp_path / "out" / "queries.parquet").to_pandas()
    for view, modalities in results.retrieval.items():
        for modality, result in modalities.items():
            rows = table[(table["view"] == view) & (table["modality"] == modality)]
            assert len(rows) == 10
            assert result.recalls["recall@5"].value == pytest.approx((rows["rank"] <= 5).mean())
            assert result.median_rank == pytest.approx(rows["rank"].median())
            first = [best[0] for best in rows["best"]]
            assert [
                one == other for one, other in zip(first, rows["pair_id"], strict=True)
            ] == list(rows["rank"] == 1)
            assert present(result.two_stage).exact_top1_kept == 1.0  # K holds the whole gallery
            assert set(result.ms) == {"exact", "two-stage"}
            assert present(result.near).gallery <= 6
    assert set(results.retrieval) == {"360-north", "90-north"}
    assert list(results.retrieval["90-north"]) == ["G"]
    assert present(results.segmentation).miou == 1.0
    scores = np.array(table["best_score"].tolist())
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    near = table[table["rank"] <= 5]
    own = [best[rank - 1] for best, rank in zip(near["best_score"], near["rank"], strict=True)]
    assert own
    np.testing.assert_allclose(own, near["score"], atol=1e-6)
    page = Path(write_evaluation_page(config.output, config.queries)).read_text()
    assert page.count("<article>") == 10  # five best, five worst, and no other is left
    assert page.count("one of the best") == page.count("one of the worst") == 5
    assert present(results.generation).retrieval["luminance"].gallery == 10


def test_evaluate_searches_the_tiles_that_were_not_deleted(folder, tmp_path):
    opened = tiny.index(str(tmp_path), COUNT)
    ids = opened.tiles[schema.PAIR_ID].to_pylist()[10:20]
    delete(DeleteTiles(output=str(tmp_path / "index"), ids=tuple(ids)))
    config = Evaluate(
        queries=os.path.join(folder, "queries"), index=str(tmp_path / "index"),
        output=str(tmp_path / "out"), modalities=("G",), modes=("two-stage",), bootstrap=5,
    )  # fmt: skip
    results = evaluate(config)
    result = results.retrieval["360-north"]["G"]
    assert result.gallery == COUNT - 10
    assert present(result.two_stage).exact_top10_kept == 1.0
    table = parquet.read_table(tmp_path / "out" / "queries.parquet").to_pandas()
    assert not set(ids) & {name for best in table["best"] for name in best}


def test_evaluate_on_unfinished_synthesis_is_refused(folder, tmp_path):
    tiny.write(tiny.rows(4), str(tmp_path / "queries"))
    os.remove(tmp_path / "queries" / "manifest.json")
    config = Evaluate(
        queries=str(tmp_path / "queries"), index=os.path.join(folder, "index"),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"expected manifest.json, found none"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_evaluate_of_rows_that_all_failed_says_why(folder, tmp_path):
    rows = [row | {schema.ERROR: "generate: broken"} for row in tiny.rows(3).to_pylist()]
    table = pa.Table.from_pylist(rows, schema.SYNTHESIZED)
    location = tiny.write(table, str(tmp_path / "queries"))
    with pytest.raises(ValueError, match=r"all 3 rows .* failed .*generate: broken"):
        evaluate(Evaluate(queries=location, index=os.path.join(folder, "index")))


def test_evaluate_counts_the_queries_that_failed_and_says_so(folder, tmp_path):
    rows = tiny.rows(10).to_pylist()
    for row in rows[:3]:
        row |= {schema.SYNTHETIC: None, schema.ERROR: "generate: broken"}
    table = pa.Table.from_pylist(rows, schema.SYNTHESIZED)
    config = Evaluate(
        queries=tiny.write(table, str(tmp_path / "queries")), output=str(tmp_path / "out"),
        index=os.path.join(folder, "index"), modalities=("G",), modes=(), bootstrap=5,
    )  # fmt: skip
    results = evaluate(config)
    assert (results.queries, results.failed) == (7, 3)
    page = Path(write_evaluation_page(config.output, config.queries)).read_text()
    assert "3 more failed in synthesis, and no number counts them" in page
