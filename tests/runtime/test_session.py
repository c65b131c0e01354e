import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from ray.data import DataContext
from ray.exceptions import RayTaskError

from cvmatch.runtime import pools, session
from cvmatch.runtime.settings import Pool
from cvmatch.runtime.streams.write import resume_from


class Scale:
    """`id` -> `value`, `factor` times as much; notes each row in a file."""

    def __init__(self, factor: int, notes: str = "", bomb: str = "") -> None:
        self.factor, self.notes, self.bomb = factor, notes, bomb

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.bomb and os.path.exists(self.bomb) and 25 in batch["id"]:
            raise RuntimeError("the machine was lost")
        if self.notes:
            with open(self.notes, "a", encoding="utf-8") as file:
                file.writelines(f"{value}\n" for value in batch["id"])
        return {**batch, "value": batch["id"] * self.factor}


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"batch": 0}, {"calls": 0}, {"size": 3, "max_size": 2}]
)
def test_pool_refuses_sizes_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="size >= 1"):
        Pool(**wrong)


def test_socket_paths_that_are_too_long_name_the_variable_and_a_way_out(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    session.check_socket_paths()
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + 71 * "x")
    with pytest.raises(ValueError, match=r"RAY_TMPDIR /scratch/x+: expected .*export RAY_TMPDIR="):
        session.check_socket_paths()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", "/" + 79 * "x")
    with pytest.raises(ValueError, match=r"^TMPDIR /x"):
        session.check_socket_paths()


@pytest.mark.ray
def test_preflight_leaves_a_cpu_to_read_and_write(ray_session):
    pools.preflight({"first": Pool(size=8, cpus=0.5), "second": Pool(size=6, cpus=0.5)})  # 7 of 8
    with pytest.raises(ValueError, match=r"need 8.5 CPUs, the cluster has 8") as error:
        pools.preflight({"first": Pool(size=8, cpus=0.5), "second": Pool(size=7, cpus=0.5)})
    assert "--first.cpus and --second.cpus" in str(error.value)


@pytest.mark.ray
def test_preflight_counts_the_actors_that_a_pool_begins_with(ray_session):
    pools.preflight({"generate.pool": Pool(size=1, max_size=16, cpus=0.5)})
    with pytest.raises(ValueError, match="CPUs"):
        pools.preflight({"generate.pool": Pool(size=15, max_size=16, cpus=0.5)})


@pytest.mark.ray
def test_preflight_names_a_label_that_no_node_has(ray_session):
    with pytest.raises(ValueError, match=r"label 'gpu-generate': .*--labels=pool=gpu-generate"):
        pools.preflight({"generate.pool": Pool(label="gpu-generate")})


@pytest.mark.ray
def test_preflight_of_a_resumable_stream_leaves_another_cpu(ray_session, tmp_path):
    pool = Pool(size=13, cpus=0.5)
    pools.preflight({"generate.pool": pool})
    with (
        resume_from(str(tmp_path)),
        pytest.raises(ValueError, match=r"need 8.5 CPUs"),
    ):
        pools.preflight({"generate.pool": pool})
    assert DataContext.get_current().checkpoint_config is None


@pytest.mark.ray
def test_preflight_refuses_gpus_that_are_not_there(ray_session):
    with pytest.raises(ValueError, match=r"need 0.5 GPUs, the cluster has 0"):
        pools.preflight({"generate.pool": Pool(gpus=0.5)})


@pytest.mark.ray
def test_start_again_keeps_the_session_and_its_settings(ray_session):
    before = ray.get_runtime_context().get_node_id()
    session.start(logical_cpus=3)
    assert ray.get_runtime_context().get_node_id() == before
    assert ray.cluster_resources()["CPU"] == 8
    context = DataContext.get_current()
    assert context.execution_no_progress_timeout_s == session.NO_PROGRESS_S
    assert context.execution_options.preserve_order


@pytest.mark.ray
@pytest.mark.slow
def test_resumable_stream_runs_only_the_rows_that_were_not_written(ray_session, tmp_path):
    source, output = str(tmp_path / "in.parquet"), str(tmp_path / "out")
    notes, bomb = tmp_path / "notes", tmp_path / "bomb"
    ids = list(range(40))
    pq.write_table(pa.table({"id": ids, "pair_id": [f"{i:07d}" for i in ids]}), source)

    def stream():
        with resume_from(str(tmp_path / "done")):
            rows = ray.data.read_parquet(source).repartition(target_num_rows_per_block=10)
            pool = Pool(size=1, batch=10)
            rows = pools.map_actors(rows, Scale, pool, factor=3, notes=str(notes), bomb=str(bomb))
            rows.write_parquet(output)

    bomb.touch()
    with pytest.raises(RayTaskError):
        stream()
    bomb.unlink()
    stream()
    once = len(notes.read_text().split())
    table = pq.read_table(output).to_pydict()
    assert dict(zip(table["id"], table["value"], strict=True)) == {i: 3 * i for i in ids}
    assert len(table["id"]) == 40
    stream()  # finished: the checkpoint stays, so nothing is done twice
    assert len(notes.read_text().split()) == once
    assert pq.read_table(output).num_rows == 40
