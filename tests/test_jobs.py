"""Every job, as a user types it, in the order of the pipeline, on the tiny world and toy models."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from cvmatch.demo.models import CLIP, DIFFUSION, SEGFORMER, TOWER

JOBS = Path(__file__).parents[1] / "jobs"
NAMES = sorted(path.name for path in JOBS.glob("*.py"))

SMALL = "--fit.epochs 1 --fit.batch 4 --fit.workers 0"


def run(job: str, words: str) -> str:
    """What `python jobs/JOB WORDS` prints; in this process, which has Ray running already."""
    before, printed = sys.argv, io.StringIO()
    sys.argv = [job, *words.split()]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(JOBS / job), run_name="__main__")
    finally:
        sys.argv = before
    return printed.getvalue()


def last(job: str, words: str) -> dict:
    return json.loads(run(job, words).splitlines()[-1])


@pytest.mark.parametrize("job", NAMES)
def test_job_is_at_most_forty_lines_and_explains_its_flags(job):
    assert len((JOBS / job).read_text().splitlines()) <= 40
    with pytest.raises(SystemExit) as exit_:
        run(job, "--help")
    assert exit_.value.code == 0


@pytest.mark.parametrize("job", NAMES)
def test_job_with_an_unknown_flag_stops_with_an_error(job):
    with pytest.raises(SystemExit) as exit_:
        run(job, "--no-such-flag 1")
    assert exit_.value.code not in (0, None)


@pytest.fixture(scope="module")
def place(tmp_path_factory, world_root, ray_session):
    """The models, rows and index that the jobs before a test's own job made."""
    at = tmp_path_factory.mktemp("jobs")
    data = f"--data.root {world_root} --fit.storage {at}/runs {SMALL}"
    last(
        "train_segmenter.py",
        f"{data} --base {SEGFORMER} --size 64 --output {at}/segmenter --fit.name segmenter",
    )
    last(
        "train_generator.py",
        f"{data} --diffusion {DIFFUSION} --clip {CLIP} --perceptual {TOWER} "
        f"--conditioning.panorama-width 256 --conditioning.crops 4 --output {at}/generator "
        f"--encoded {at}/encoded --fit.name generator",
    )
    for split in ("train", "val"):
        last(
            "synthesize.py",
            f"--data.root {world_root} --data.split {split} --data.block 4 "
            f"--generate.model {at}/generator --generate.steps 2 --segment.model {at}/segmenter "
            f"--output {at}/{split}",
        )
    last("train_matcher.py", matcher(at, "matcher"))
    last(
        "build_index.py",
        f"--tiles.root {world_root} --model {at}/matcher --output {at}/index --queries {at}/val",
    )
    return at


def matcher(at: Path, name: str, more: str = "") -> str:
    return (
        f"--pairs {at}/train --val {at}/val --tower {TOWER} --panorama 64 256 --polar 64 256 "
        f"--square 64 --hidden 32 --output {at}/{name} --fit.storage {at}/runs "
        f"--fit.name {name} {SMALL} {more}"
    )


@pytest.mark.ray
def test_search_ranks_tiles_of_panorama_files(place, world_root):
    panoramas = sorted((Path(world_root) / "streetview").glob("*.jpg"))[-2:]
    words = " ".join(f"--panorama {path}" for path in panoramas)
    lines = run("search.py", f"--index {place}/index --top-k 3 {words}").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["rank"] for row in rows] == [1, 2, 3] * 2
    assert [row["query"] for row in rows] == [str(p) for p in panoramas for _ in range(3)]
    assert rows[0]["score"] >= rows[1]["score"] >= rows[2]["score"]
    assert {"tile", "latitude", "longitude"} <= rows[0].keys()


@pytest.mark.ray
def test_index_grows_shrinks_and_is_verified(place, world_root):
    at, root = f"{place}/grown", f"--tiles.root {world_root}"
    built = last("build_index.py", f"{root} --model {place}/matcher --output {at}")
    tiles = built["rows"]
    again = last("build_index.py", f"{root} --model {place}/matcher --output {at} --key SQ8")
    assert (again["version"], again["rows"]) == ("v000002", tiles)
    old = Path(at, "versions", "v000001", "manifest.json")
    old.write_text(old.read_text().replace('"format": 2', '"format": 1'))  # of an older cvmatch
    info = last("index.py", f"info --index {at}")
    assert info["seconds"]["embed"] == 0.0  # by the same tower: not embedded again
    added = last("index.py", f"add --output {at} {root} --tiles.split train --queries {place}/val")
    assert (added["rows"], added["recall"]["top1"]) == (tiles + 24, 1.0)
    last("index.py", f"delete --output {at} --ids 0000001 0000002")
    last("index.py", f"compact --output {at}")
    checked = last("index.py", f"verify --index {at} --deep True")
    assert checked["tiles"] == tiles + 22
    assert checked["probes"] == tiles
    assert last("index.py", f"vacuum --output {at} --keep 1")["versions"] == 4
    with pytest.raises(SystemExit, match="expected one of info, verify"):
        run("index.py", "destroy")


@pytest.mark.ray
def test_evaluate_reports_every_level_and_refuses_training_pairs(place):
    words = f"--index {place}/index --output {place}/evaluation --bootstrap 50"
    results = last("evaluate.py", f"--queries {place}/val {words}")
    assert set(results["retrieval"]["360-north"]) == {"G", "G+A", "G+A+S", "A"}
    with pytest.raises(ValueError, match="trained on 24 of 24"):
        run("evaluate.py", f"--queries {place}/train {words}")


@pytest.mark.ray
def test_train_matcher_twice_with_one_seed_gives_equal_metrics(place):
    first, second = (last("train_matcher.py", matcher(place, name)) for name in ("one", "two"))
    assert first["train/loss"] == second["train/loss"]
    assert first["val/loss"] == second["val/loss"]


@pytest.mark.ray
def test_train_matcher_again_with_its_name_does_not_train_again(place):
    before = (place / "matcher" / "model.safetensors").stat().st_mtime_ns
    checkpoints = sorted((place / "runs" / "matcher").glob("epoch_*/state.pt"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    last("train_matcher.py", matcher(place, "matcher"))
    assert [path.stat().st_mtime_ns for path in checkpoints] == times
    assert before <= (place / "matcher" / "model.safetensors").stat().st_mtime_ns


@pytest.mark.ray
def test_tune_writes_settings_that_the_training_job_takes(place):
    shared = place / "shared.yaml"
    words = matcher(place, "trial").split()
    tree: dict = {"fit": {}}
    for flag, *values in _grouped(words):
        branch = tree["fit"] if flag.startswith("fit.") else tree
        value = [yaml.safe_load(v) for v in values]
        branch[flag.removeprefix("fit.").replace("-", "_")] = value if len(value) > 1 else value[0]
    shared.write_text(yaml.safe_dump(tree))
    space = place / "space.yaml"
    space.write_text("margin: {uniform: [0.1, 0.2]}\n")
    found = last(
        "tune.py",
        f"--stage matcher --base {shared} --space {space} --trials 2 --concurrent 1 --epochs 1 "
        f"--storage {place}/runs --name tune --output {place}/tuned",
    )
    assert 0.1 <= found["params"]["margin"] <= 0.2
    best = yaml.safe_load((place / "tuned" / "best.yaml").read_text())
    assert best["margin"] == found["params"]["margin"]
    assert (best["val"], best["hidden"], best["fit"]["name"]) == (f"{place}/val", 32, "")
    # The file alone: towers and validation rows are the trials'.
    made = last("train_matcher.py", f"--config {place}/tuned/best.yaml")
    assert "val/loss" in made


def _grouped(words: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([word.removeprefix("--")])
        else:
            groups[-1].append(word)
    return groups
