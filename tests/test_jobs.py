"""What commands answer, in the folder in which README.md's commands were typed."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from cvmatch import cli

pytestmark = pytest.mark.ray  # the commands of README.md are typed first


@pytest.fixture
def folder(readme, monkeypatch) -> Path:
    monkeypatch.chdir(readme.folder)
    return readme.folder


def run(words: str) -> list[dict]:
    """The lines that `cvmatch WORDS` prints; in this process, which has Ray running already."""
    with redirect_stdout(io.StringIO()) as printed:
        cli.main(argv=words.split())
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def test_search_ranks_tiles_of_panorama_files(folder, world_root):
    panoramas = sorted((Path(world_root) / "streetview").glob("*.jpg"))[-2:]
    words = " ".join(f"--panorama {path}" for path in panoramas)
    rows = run(f"search --index data/index --top-k 3 {words}")
    assert [row["rank"] for row in rows] == [1, 2, 3] * 2
    assert [row["query"] for row in rows] == [str(p) for p in panoramas for _ in range(3)]
    assert rows[0]["score"] >= rows[1]["score"] >= rows[2]["score"]
    assert {"tile", "latitude", "longitude"} <= rows[0].keys()


def test_index_grows_shrinks_and_is_verified(folder, world_root):
    tiles = f"--tiles.root {world_root} --output grown"
    (built,) = run(f"build-index {tiles} --model models/matcher")
    (again,) = run(f"build-index {tiles} --model models/matcher --key SQ8")
    assert (again["version"], again["rows"]) == ("v000002", built["rows"])
    (info,) = run("index info --index grown")
    assert info["seconds"]["embed"] == 0.0  # by the same tower: not embedded again
    (added,) = run(f"index add {tiles} --tiles.split train --queries data/synthesized/val")
    assert (added["rows"], added["recall"]["top1"]) == (built["rows"] + 24, 1.0)
    run("index delete --output grown --ids 0000001 0000002")
    run("index compact --output grown")
    (checked,) = run("index verify --index grown --deep")
    assert checked["tiles"] == built["rows"] + 22
    (removed,) = run("index vacuum --output grown --keep 1")
    assert removed["versions"] == 4


def test_evaluate_reports_every_level_and_refuses_training_pairs(folder, capsys):
    words = "--index data/index --output evaluation --bootstrap 50"
    (results,) = run(f"evaluate --queries data/synthesized/val {words}")
    assert set(results["retrieval"]["360-north"]) == {"G", "G+A", "G+A+S", "A"}
    with pytest.raises(SystemExit) as caught:
        run(f"evaluate --queries data/synthesized/train {words}")
    assert caught.value.code == cli.WRONG_INPUT
    assert "trained on 24 of 24" in capsys.readouterr().err.splitlines()[-1]


def test_train_matcher_twice_with_one_seed_gives_equal_metrics_and_again_trains_not(folder):
    words = "train-matcher --config toy/matcher.yaml --output again --fit.name"
    (first,), (second,) = (run(f"{words} {name}") for name in ("one", "two"))
    assert first == second
    checkpoints = sorted((folder / "runs" / "one").glob("epoch_*/state.pt"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert times
    published = (folder / "again" / "model.safetensors").stat().st_mtime_ns
    assert run(f"{words} one") == [first]
    assert [path.stat().st_mtime_ns for path in checkpoints] == times
    assert published <= (folder / "again" / "model.safetensors").stat().st_mtime_ns
