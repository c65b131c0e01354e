"""Trainings and searches on a cluster whose only shared place is an object store."""

import json
import urllib.parse
import urllib.request

import pytest
import yaml

from cvmatch.data import storage
from tests.helpers.cluster import Cluster
from tests.helpers.toys import SEGFORMER

pytestmark = pytest.mark.cluster


def runs_of(cluster: Cluster, name: str) -> list[dict]:
    """MLflow's runs of the experiments, newest first."""
    ask = urllib.request.Request(
        f"{cluster.tracking}/api/2.0/mlflow/experiments/search",
        json.dumps({"max_results": 100}).encode(),
        {"Content-Type": "application/json"},
    )
    experiments = json.load(urllib.request.urlopen(ask))["experiments"]
    ids = [one["experiment_id"] for one in experiments]
    ask = urllib.request.Request(
        f"{cluster.tracking}/api/2.0/mlflow/runs/search",
        json.dumps({"experiment_ids": ids, "max_results": 200}).encode(),
        {"Content-Type": "application/json"},
    )
    found = json.load(urllib.request.urlopen(ask)).get("runs", [])
    return [
        one
        for one in found
        if any(name in str(param["value"]) for param in one["data"].get("params", []))
    ]


def test_workers_of_two_nodes_train_together(cluster, toys):
    more = ["--fit.workers", "2", "--fit.cpus-per-worker", "3"]  # more than one fits on a node
    job = cluster.run(*toys.train("two-workers", *more))
    assert job.code == 0, job.log
    assert storage.exists(f"{toys.bucket}/models/two-workers/config.json")
    assert {run["info"]["status"] for run in runs_of(cluster, "two-workers")} == {"FINISHED"}


def test_training_takes_the_workers_that_there_are(cluster, toys):
    elastic = ["--fit.workers", "1", "--fit.max-workers", "3", "--fit.cpus-per-worker", "3"]
    often = ["--fit.checkpoint-minutes", "0.01", "--fit.epochs", "150", "--fit.max-failures", "9"]
    job = cluster.submit(*toys.train("elastic", *elastic, *often, "--fit.batch", "6"))
    job.wait_for("epoch 5/150")
    for name in ("two", "three"):
        cluster.kill_node(name)
    job.wait_for("epoch 40/150")
    for name in ("two", "three"):
        cluster.start_node(name)
    assert job.wait(1500).code == 0, job.log
    ledger = storage.read_json(f"{toys.bucket}/runs/elastic/epochs.json")["epochs"]
    assert [one["epoch"] for one in ledger] == list(range(1, 151))
    assert {one["train/rows"] for one in ledger} == {24}
    workers = [one["train/workers"] for one in ledger]
    assert workers[0] == 3
    assert min(workers) == 1
    assert workers[-1] == 3


def test_mlflow_server_that_is_away_ends_no_training(cluster, toys):
    job = cluster.submit(*toys.train("untracked", "--fit.epochs", "6"))
    job.wait_for("epoch 1/6")
    cluster.stop("mlflow")
    job.wait_for("epoch 3/6")
    cluster.start_tracking()
    assert job.wait().code == 0, job.log
    assert {run["info"]["status"] for run in runs_of(cluster, "untracked")} == {"FINISHED"}


def test_search_of_settings_keeps_its_trials_in_the_store(cluster, toys, tmp_path):
    base = {
        "base": SEGFORMER, "size": 64, "data": {"root": toys.world},
        "val": {"root": toys.world, "split": "val"}, "fit": {"epochs": 1, "batch": 4},
    }  # fmt: skip
    storage.write_text(f"{toys.bucket}/base.yaml", yaml.safe_dump(base))
    job = cluster.run(
        "python", "jobs/tune.py", "--stage", "segmenter", "--base", f"{toys.bucket}/base.yaml",
        "--trials", "2", "--concurrent", "2", "--storage", f"{toys.bucket}/runs",
        "--name", "search", "--output", f"{toys.bucket}/tuned",
    )  # fmt: skip
    assert job.code == 0, job.log
    best = yaml.safe_load(storage.read_text(f"{toys.bucket}/tuned/best.yaml"))
    assert best["base"] == SEGFORMER
    assert storage.names(f"{toys.bucket}/runs/search-fits")
