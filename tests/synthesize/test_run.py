"""The streaming pass: every pair once, whatever is broken or killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from PIL import Image

from cvmatch import cli
from cvmatch.data import images, schema, tables
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Generate
from cvmatch.runtime import tracking
from cvmatch.runtime.settings import Pool
from cvmatch.segment.batches import Preprocess
from cvmatch.segment.model import Segmenter
from cvmatch.segment.settings import Segment
from cvmatch.synthesize.run import OPERATORS, synthesize
from cvmatch.synthesize.settings import Synthesize

pytestmark = pytest.mark.ray

JOB = Path(__file__).parents[2] / "jobs" / "synthesize.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory, world_root, ray_session):
    at = tmp_path_factory.mktemp("synthesize")
    conditioning = Conditioning(panorama_width=256)
    Generator.base(base_models.DIFFUSION, base_models.CLIP, conditioning).save(f"{at}/generator")
    Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=64)).save(f"{at}/segmenter")
    return Synthesize(
        data=Ingest(root=world_root, block=2),
        # Batches that blocks do not fill, so that a resumed run makes other ones.
        generate=Generate(model=f"{at}/generator", num_inference_steps=2, pool=Pool(batch=5)),
        segment=Segment(model=f"{at}/segmenter", pool=Pool(batch=3)),
        output=f"{at}/rows",
    )


def rows(output: str) -> dict[str, dict]:
    found = [
        row
        for table in tables.batches(output, schema.SYNTHESIZED.names)
        for row in table.to_pylist()
    ]
    by_id = {row[schema.PAIR_ID]: row for row in found}
    assert len(by_id) == len(found), "a row is there twice"
    return by_id


@pytest.fixture(scope="module")
def undisturbed(config):
    made = synthesize(config)
    return made, rows(config.output)


def test_synthesize_writes_every_pair_once_with_a_manifest(undisturbed, config):
    made, found = undisturbed
    assert len(found) == made["rows"] == 24
    assert all(row[schema.SYNTHETIC] and row[schema.SYNTHETIC_CLASSES] for row in found.values())
    assert set(made["models"]) == {"generator", "segmenter"}
    assert not os.path.exists(f"{config.output}.partial")


def test_synthesize_records_the_speed_of_its_stages(undisturbed):
    client = MlflowClient(tracking.tracking_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'cvmatch'")
    found = client.search_runs([experiment.experiment_id], "tags.stage = 'synthesize'")
    run = next(one for one in found if one.info.status == "FINISHED")
    rates = {name: run.data.metrics[f"rate/{name}"] for name in OPERATORS}
    assert all(rate > 0 for rate in rates.values())
    assert run.data.tags["slowest"] == min(rates, key=rates.__getitem__)


def test_synthesize_again_keeps_the_finished_output(undisturbed, config):
    before = {p.name: p.stat().st_mtime_ns for p in Path(config.output).glob("*.parquet")}
    assert synthesize(config)["rows"] == 24
    assert {p.name: p.stat().st_mtime_ns for p in Path(config.output).glob("*.parquet")} == before


def test_synthesize_with_other_settings_refuses_the_output(undisturbed, config):
    other = replace(config, generate=replace(config.generate, num_inference_steps=3))
    with pytest.raises(ValueError, match="made from"):
        synthesize(other)


def test_synthesize_with_maps_of_other_pictures_refuses_the_output(undisturbed, config):
    other = replace(config, segment=replace(config.segment, source="aerial"))
    with pytest.raises(ValueError, match="made from"):
        synthesize(other)


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """Settings of a run that was killed when two of its parts or more were written."""
    begun = replace(config, output=str(tmp_path_factory.mktemp("killed") / "rows"))
    words = [
        *("--data.root", begun.data.root, "--data.block", "2"),
        *("--generate.model", begun.generate.model, "--generate.num-inference-steps", "2"),
        *("--generate.pool.batch", "5", "--segment.pool.batch", "3"),
        *("--segment.model", begun.segment.model),
        *("--output", begun.output),
    ]
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, str(JOB), *words], env={**os.environ, "RAY_ADDRESS": address}
    )
    try:
        _wait(lambda: driver.poll() is not None or len(_parts(begun)) >= 2)
        assert driver.poll() is None, "it ended before it was killed"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (Path(begun.output) / "manifest.json").exists()
    return begun


def test_synthesize_makes_all_rows_of_a_killed_output_that_was_deleted(
    undisturbed, killed, tmp_path
):
    deleted = replace(killed, output=str(tmp_path / "rows"))
    shutil.copytree(f"{killed.output}.partial", f"{deleted.output}.partial")
    synthesize(deleted)
    assert rows(deleted.output) == undisturbed[1]


def test_synthesize_killed_in_the_middle_goes_on_where_it_stopped(undisturbed, killed):
    begun = {p.name: p.stat().st_mtime_ns for p in Path(killed.output).glob("*.parquet")}
    synthesize(killed)
    after = {p.name: p.stat().st_mtime_ns for p in Path(killed.output).glob("*.parquet")}
    kept = [name for name in begun if after.get(name) == begun[name]]
    assert len(kept) >= len(begun) - 1  # one part may have been half written
    assert rows(killed.output) == undisturbed[1]


@pytest.fixture
def copied(config, world_root, tmp_path):
    """Settings for a copy of the world, whose pictures have been checked, and its ids."""
    data = tmp_path / "world"
    shutil.copytree(world_root, data, ignore=shutil.ignore_patterns(".cvmatch"))
    found = replace(
        config,
        data=Ingest(root=str(data), block=4),
        output=str(tmp_path / "rows"),
        max_rejected=0.1,
    )
    ids = sorted(row[schema.PAIR_ID] for row in PairDataset.open(found.data).rows().take_all())
    return found, ids


def _spoil(settings, pair_id: str) -> None:
    """Make the panorama of a pair unreadable."""
    (Path(settings.data.root) / "streetview" / f"{pair_id}.jpg").write_bytes(b"no picture")


def test_synthesize_refuses_the_output_of_other_pictures_or_rows_at_the_same_place(copied):
    settings, _ = copied
    table = Path(settings.data.root) / "train-19zl.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:4]))
    synthesize(settings)
    some = next(iter(rows(settings.output)))
    (tile,) = (Path(settings.data.root) / "bingmap").glob(f"*{some}.*")
    before = tile.read_bytes()
    images.open_image(before).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tile)
    with pytest.raises(ValueError, match="made from"):
        synthesize(settings)
    tile.write_bytes(before)
    assert synthesize(settings)["rows"] == 4
    table.write_text("".join(lines[:6]))
    with pytest.raises(ValueError, match="made from"):
        synthesize(settings)


def test_synthesize_names_a_bad_picture_and_goes_on(copied):
    broken, ids = copied
    _spoil(broken, ids[3])
    synthesize(broken)
    found = rows(broken.output)
    assert len(found) == len(ids)
    assert [name for name, row in found.items() if row[schema.ERROR]] == [ids[3]]
    lines = (Path(broken.output) / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["pair_id"] for line in lines] == [ids[3]]


def test_synthesize_stops_when_too_many_rows_fail(copied):
    broken, ids = copied
    for pair_id in ids[:3]:  # of 24
        _spoil(broken, pair_id)
    with pytest.raises(ValueError, match=r"at most 10% of 24 rows to fail, got 3 .*not a PNG") as e:
        synthesize(broken)
    assert cli.is_wrong_input(e.value)  # Ray, in which it is raised, takes tracebacks away
    lines = (Path(broken.output) / "rejected.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["pair_id"] for line in lines) == ids[:3]
    assert not (Path(broken.output) / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("actor", ["GenerateAerial", "SegmentAerial"])
def test_synthesize_with_a_killed_replica_makes_the_same_rows(undisturbed, config, actor, tmp_path):
    other = replace(config, output=str(tmp_path / "rows"))
    with ThreadPoolExecutor() as threads:
        killed = threads.submit(_kill_a_replica, actor, other)
        synthesize(other)
        parts = killed.result()
    assert parts < len(_parts(other)), "it was killed when all was done"
    assert rows(other.output) == undisturbed[1]


def _kill_a_replica(actor: str, config: Synthesize) -> int:
    """Kill the replica when parts are there, and wait for another; returns the number of parts."""
    _wait(lambda: len(_parts(config)) >= 2)
    (killed,) = _replicas(actor)
    parts = len(_parts(config))
    os.kill(killed, signal.SIGKILL)
    _wait(lambda: _replicas(actor) - {killed})
    return parts


def _replicas(actor: str) -> set[int]:
    """Processes of this Ray that run an actor, which Ray names in their command lines."""
    session = f"RAY_TMPDIR={os.environ['RAY_TMPDIR']}".encode()
    pids = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_text(errors="replace")
            if not (title.startswith("ray::") and actor in title):
                continue
            if session in (process / "environ").read_bytes().split(b"\0"):
                pids.add(int(process.name))
        except OSError:  # it has just ended
            continue
    return pids


def _parts(config: Synthesize) -> list[Path]:
    return list(Path(config.output).glob("*.parquet"))


def _wait(ready, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "nothing was written in time"
        time.sleep(0.02)
