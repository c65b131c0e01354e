"""What a scrape of this node's Ray finds of a stream and a training."""

import functools
import re
import time
import urllib.request
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from cvmatch.runtime.gauges import GAUGES, set_gauge
from cvmatch.runtime.settings import Pool
from cvmatch.runtime.streams.write import Stream, write_stream
from cvmatch.training import launch
from cvmatch.training.settings import TrainConfig
from tests.helpers import stage

pytestmark = pytest.mark.ray

COLUMNS = pa.schema([("pair_id", pa.string()), ("error", pa.string())])


def scrape(wanted: Mapping[str, float]) -> dict[str, float]:
    """Our gauges by name and labels, once some have their values: Ray hands them on late."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, float] = {}
    until = time.monotonic() + 60
    while not wanted.items() <= found.items() and time.monotonic() < until:
        time.sleep(1)
        lines = urllib.request.urlopen(url).read().decode().splitlines()
        found = dict(_read(line) for line in lines if line.startswith("ray_cvmatch"))
    return found


def _read(line: str) -> tuple[str, float]:
    name, labels, value = re.match(r"(\w+)\{(.*)\} (\S+)", line).groups()  # pyright: ignore
    ours = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    tags = GAUGES[name.removeprefix("ray_")][1]
    return " ".join([name.removeprefix("ray_cvmatch_"), *(ours[tag] for tag in tags)]), float(value)


def fail_some(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    errors = np.array([None if at else "broken" for at in batch["id"]], dtype=object)
    return {"pair_id": batch["id"].astype(str).astype(object), "error": errors}


def test_stream_reports_its_rows(ray_session, tmp_path):
    stream = Stream(
        label="tried", output=str(tmp_path / "rows"), provenance={},
        rows=lambda: ray.data.range(8).map_batches(fail_some),  # pyright: ignore
        total=lambda: 8, columns=COLUMNS, pools={"pool": Pool()},
        operators={"fail": "fail_some"}, max_rejected=0.5,
    )  # fmt: skip
    write_stream(stream)
    rows = {"stream_rows tried": 8, "stream_rows_expected tried": 8, "stream_rows_failed tried": 1}
    found = scrape(rows)
    assert {name: found.get(name) for name in rows} == rows
    stages = {name.split()[-1] for name in found if name.startswith("stage_seconds tried")}
    assert stages == {"fail", "write"}


def test_training_reports_its_steps_and_validation(ray_session, tmp_path):
    fit = TrainConfig(epochs=2, batch=4, storage=str(tmp_path), name="line")
    build = functools.partial(stage.LineTask, 0.05)
    launch.train(build, stage.rows(16), stage.rows(8, seed=1), fit)
    done = {"train_steps line": 8, "train_epoch line": 2}
    found = scrape(done)
    assert {name: found.get(name) for name in done} == done
    assert found["train_loss line"] >= 0
    assert found["validation line loss"] >= 0


def test_gauge_that_nobody_named_is_a_defect(ray_session):
    with pytest.raises(KeyError):
        set_gauge("cvmatch_surprise", 1.0)
    assert all(name.startswith("cvmatch_") for name in GAUGES)
