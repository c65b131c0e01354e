"""The streaming pass: every pair once, whatever is broken or killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cvmatch import schema, shard, toy
from cvmatch.engine import Pool
from cvmatch.generate.condition import Conditioning
from cvmatch.generate.infer import Generate
from cvmatch.generate.model import Generator
from cvmatch.ingest import Ingest, ingest
from cvmatch.segment.infer import Segment
from cvmatch.segment.model import Segmenter
from cvmatch.segment.pairs import Preprocess
from cvmatch.synthesize import Synthesize, synthesize

pytestmark = pytest.mark.ray

JOB = Path(__file__).parents[1] / "jobs" / "synthesize.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory, world_root, ray_session):
    at = tmp_path_factory.mktemp("synthesize")
    conditioning = Conditioning(panorama_width=256, crops=4)
    Generator.base(toy.DIFFUSION, toy.CLIP, conditioning).save(f"{at}/generator")
    Segmenter.from_base(toy.SEGFORMER, Preprocess(size=64)).save(f"{at}/segmenter")
    return Synthesize(
        data=Ingest(root=world_root, block=2),
        # Batches as large as blocks, so that a resumed run has the same: the last bits of a picture
        # depend on its batch.
        generate=Generate(model=f"{at}/generator", steps=2, pool=Pool(batch=2)),
        segment=Segment(model=f"{at}/segmenter", pool=Pool(batch=2)),
        output=f"{at}/rows",
    )


def rows(output: str) -> dict[str, dict]:
    found = [
        row
        for table in shard.batches(output, schema.SYNTHESIZED.names)
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


def test_synthesize_again_keeps_the_finished_output(undisturbed, config):
    before = {p.name: p.stat().st_mtime_ns for p in Path(config.output).glob("*.parquet")}
    assert synthesize(config)["rows"] == 24
    assert {p.name: p.stat().st_mtime_ns for p in Path(config.output).glob("*.parquet")} == before


def test_synthesize_with_other_settings_refuses_the_output(undisturbed, config):
    other = replace(config, generate=replace(config.generate, steps=3))
    with pytest.raises(ValueError, match="made from"):
        synthesize(other)


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """Settings of a run that was killed when two of its parts or more were written."""
    begun = replace(config, output=str(tmp_path_factory.mktemp("killed") / "rows"))
    words = [
        *("--data.root", begun.data.root, "--data.block", "2"),
        *("--generate.model", begun.generate.model, "--generate.steps", "2"),
        *("--generate.pool.batch", "2", "--segment.pool.batch", "2"),
        *("--segment.model", begun.segment.model),
        *("--output", begun.output),
    ]
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, str(JOB), *words], env={**os.environ, "RAY_ADDRESS": address}
    )
    try:
        _wait(lambda: len(list(Path(begun.output).glob("*.parquet"))) >= 2, driver)
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


def test_synthesize_names_a_bad_picture_and_goes_on(config, world_root, tmp_path):
    data = tmp_path / "world"
    shutil.copytree(world_root, data, ignore=shutil.ignore_patterns(".cvmatch"))
    broken = replace(
        config,
        data=Ingest(root=str(data), block=4),
        output=str(tmp_path / "rows"),
        max_rejected=0.1,
    )
    ids = sorted(row[schema.PAIR_ID] for row in ingest(broken.data).take_all())
    (data / "streetview" / f"{ids[3]}.jpg").write_bytes(b"no picture")  # after it was checked
    synthesize(broken)
    found = rows(broken.output)
    assert len(found) == len(ids)
    assert [name for name, row in found.items() if row[schema.ERROR]] == [ids[3]]
    lines = (Path(broken.output) / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["pair_id"] for line in lines] == [ids[3]]


def _wait(ready, process, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < end, "nothing was written in time"
        time.sleep(0.02)
