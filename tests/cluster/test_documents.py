"""The commands of docs/cluster.md, typed on the head as they stand there: the whole pipeline."""

import pytest
import yaml
from pyarrow import fs

from cvmatch.data import schema, storage, tables
from tests.cluster.test_trainings import runs_of
from tests.helpers.cluster import BUCKET, Cluster
from tests.helpers.documents import ROOT, TOY, scripts

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

TWO_WORKERS = {"epochs": 1, "batch": 4, "workers": 2}

MODELS = {
    "segmenter.yaml": ("base",),
    "generator.yaml": ("diffusion", "clip", "lpips_vgg"),
    "matcher.yaml": ("tower",),
}
"""Settings that are directories of this checkout: a job has a copy of it."""


def write_settings(location: str, root: str) -> None:
    """Write the toy settings, with workers on two nodes and locations of the store."""
    toy = TOY | {"search.yaml": {}, "index.yaml": {"pool": {"size": 2}}}
    toy["tune.yaml"] = {"trials": 8, "epochs": 1, "concurrent": 2}
    for name, settings in toy.items():
        changed = dict(settings)
        for key in MODELS.get(name, ()):
            changed[key] = settings[key].removeprefix(f"{ROOT}/")
        if name in MODELS:
            changed["fit"] = TWO_WORKERS
        if name == "matcher.yaml":
            del changed["pairs"], changed["val"]
            pairs = {split: f"{root}/synthesized/{split}" for split in ("train", "val")}
            whole = changed | {"pairs": pairs["train"], "val": pairs["val"]}
            whole["fit"] = TWO_WORKERS | {"workers": 0}
            storage.write_text(f"{root}/{name}", yaml.safe_dump(whole))
        storage.write_text(f"{location}/{name}", yaml.safe_dump(changed))


def test_every_command_of_the_document_runs_as_it_stands_there(cluster: Cluster, toys):
    root = f"{toys.bucket}/document"
    store = cluster.store
    fs.copy_files(f"{BUCKET}/world", f"{BUCKET}/document/CVUSA", store, store)
    write_settings(f"{root}/configs", root)
    variables = {
        "STORE": root,
        "CONFIGS": f"{root}/configs",
        "RUNTIME": f'{{"env_vars": {{"MLFLOW_TRACKING_URI": "{cluster.tracking}"}}}}',
    }
    for script in scripts(ROOT / "docs" / "cluster.md"):
        if "ray job submit" in script:
            cluster.type(_without_exports(script), **variables)

    parts = tables.batches(f"{root}/found", ["tiles", schema.ERROR])
    found = [row for table in parts for row in table.to_pylist()]
    assert len(found) == 12
    assert all(row[schema.ERROR] is None and len(row["tiles"]) == 10 for row in found)
    results = storage.read_json(f"{root}/evaluation/results.json")
    assert results["queries"] == 12
    best = yaml.safe_load(storage.read_text(f"{root}/tuned/best.yaml"))
    assert best["pairs"] == f"{root}/synthesized/train"
    states = {run["info"]["status"] for run in runs_of(cluster, "document")}
    assert states <= {"FINISHED", "KILLED"}  # of a trial that was stopped early


def _without_exports(script: str) -> str:
    """Leave out the lines that name another store and server than this cluster has."""
    lines = script.splitlines()
    return "\n".join(line for line in lines if not line.startswith("export "))
