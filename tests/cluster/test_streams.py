"""Rows on a cluster whose only shared place is an object store, through what goes wrong there."""

import time

import pyarrow as pa
import pytest
import torch

from cvmatch.data import schema, storage, tables
from cvmatch.index.reader import Index, rank
from cvmatch.match.infer import EmbedQuery

pytestmark = pytest.mark.cluster

PICTURES = [schema.PAIR_ID, schema.GROUND, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES, schema.ERROR]


def read_rows(location: str) -> list[dict]:
    found = [row for table in tables.batches(location, PICTURES) for row in table.to_pylist()]
    return sorted(found, key=lambda row: row[schema.PAIR_ID])


def test_rows_become_an_index_that_grows_and_is_searched(cluster, toys, undisturbed):
    index = f"{toys.bucket}/index"
    add = ["python", "jobs/index.py", "add", "--tiles.root", toys.world, "--tiles.split", "val"]
    for command in (
        toys.build_index(undisturbed, index),
        [*add, "--output", index],
        toys.search_rows(undisturbed, index, f"{toys.bucket}/found"),
    ):
        job = cluster.run(*command)
        assert job.code == 0, job.log
    found = Index.open(index)
    assert len(found) == 24 + 12
    rows = pa.concat_tables(tables.batches(undisturbed, PICTURES))
    columns = {name: rows[name].to_numpy() for name in rows.column_names}
    vectors = EmbedQuery(found.matcher_dir, "G+A+S")(columns)["query_vector"]
    best = rank(found, torch.from_numpy(vectors), 5).rows
    expected = {
        pair_id: [tile["pair_id"] for tile in found.describe(row)]
        for pair_id, row in zip(rows[schema.PAIR_ID].to_pylist(), best, strict=True)
    }
    answers = {
        row["pair_id"]: row["tiles"]
        for table in tables.batches(f"{toys.bucket}/found", ["pair_id", "tiles"])
        for row in table.to_pylist()
    }
    assert len(answers) == 24
    assert all(answers[pair_id] == tiles for pair_id, tiles in expected.items())


def test_store_that_is_away_for_a_while_ends_nothing(cluster, toys, undisturbed):
    output = f"{toys.bucket}/rows/away"
    job = cluster.submit(*toys.synthesize(output))
    job.wait_for("synthesize  ")
    cluster.refuse("503")
    time.sleep(20)
    cluster.refuse("ok")
    assert job.wait().code == 0, job.log
    assert read_rows(output) == read_rows(undisturbed)


def test_node_that_dies_ends_nothing(cluster, toys, undisturbed):
    output = f"{toys.bucket}/rows/death"
    job = cluster.submit(*toys.synthesize(output, "--generate.pool.label", "gpu-generate"))
    job.wait_for("synthesize  ")
    cluster.kill_node("two")
    cluster.start_node("two")
    assert job.wait().code == 0, job.log
    assert read_rows(output) == read_rows(undisturbed)
    cluster.wait_for_nodes(4)


def test_second_job_of_an_output_is_refused_and_the_first_ends(cluster, toys, undisturbed):
    output = f"{toys.bucket}/rows/twice"
    first = cluster.submit(*toys.synthesize(output))
    while not storage.exists(f"{output}.lease"):
        time.sleep(0.5)
    second = cluster.run(*toys.synthesize(output))
    assert second.code != 0
    assert "expected no other job to write it, but `synthesize.py" in second.log
    assert first.wait().code == 0, first.log
    assert read_rows(output) == read_rows(undisturbed)


def test_driver_that_is_killed_goes_on_with_the_same_command(cluster, toys, undisturbed):
    output = f"{toys.bucket}/rows/killed"
    job = cluster.submit(*toys.synthesize(output))
    job.wait_for("synthesize  ")
    cluster.on("head", "pkill", "-9", "-f", "jobs/synthesize.py")
    assert job.wait().code != 0
    again = cluster.run(*toys.synthesize(output))
    assert again.code == 0, again.log
    assert read_rows(output) == read_rows(undisturbed)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--generate.pool.label", "gpu-draw"], "label 'gpu-draw': expected nodes"),
        (["--output", "data/rows"], "--output: expected an absolute path or a URI"),
        (["--generate.model", "/tmp/home/nothing"], "/tmp/home/nothing' (on "),
    ],
)
def test_what_cannot_work_is_said_at_once(cluster, toys, flags, reason):
    job = cluster.run(*toys.synthesize(f"{toys.bucket}/rows/wrong", *flags))
    assert job.code != 0
    assert reason in job.log
    assert time.monotonic() - job.begun < 120
