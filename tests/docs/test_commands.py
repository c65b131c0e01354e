"""Every command that README.md and docs/ tell a person to type, typed as it stands there.

The fenced `sh` blocks of a document run in their order, in one folder that looks like a fresh clone
with a data set beside it. The documents name what differs from a user's case by variables (`CVUSA`,
`CONFIGS`, ...), which are set here to tiny data and to toy base models.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from cvmatch import config
from cvmatch.data import schema, tables
from cvmatch.demo import models as base_models
from cvmatch.generate.settings import TrainGenerator
from cvmatch.index.settings import BuildIndex
from cvmatch.match.settings import TrainMatcher
from cvmatch.segment.settings import TrainSegmenter
from cvmatch.synthesize.settings import Synthesize
from cvmatch.tune.run import Tune

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
KINDS = {"sh", "text", "yaml", "python", "json"}
"""What a fence may hold; only `sh` is typed."""

UNTYPED = {
    "make demo": "takes minutes, and its stages have tests of their own",
    "make test": "is what runs this",
    "make install": "made what runs this",
    "make check": "continuous integration runs it beside the tests",
    "ray up": "starts machines in a cloud: tests/test_cluster.py checks the file",
    "ray dashboard": "needs that cluster",
    "ray get-auth-token": "writes the token of whoever types it",
    "ray job submit": "needs that cluster: the job's own flags are parsed",
    "export RAY_AUTH_MODE": "would shut out this session's Ray",
}
"""Beginnings of commands that cannot run here, and what stands in for that."""

JOBS = {
    "synthesize.py": Synthesize,
    "train_matcher.py": TrainMatcher,
}
"""Of those that are submitted to a cluster."""

CONFIGS = {
    "segmenter.yaml": TrainSegmenter,
    "generator.yaml": TrainGenerator,
    "synthesize.yaml": Synthesize,
    "matcher.yaml": TrainMatcher,
    "index.yaml": BuildIndex,
    "tune.yaml": Tune,
}

FIT = {"epochs": 1, "batch": 4, "workers": 0}
TOY = {
    "segmenter.yaml": {"base": str(base_models.SEGFORMER), "size": 64, "fit": FIT},
    "generator.yaml": {
        "diffusion": str(base_models.DIFFUSION),
        "clip": str(base_models.CLIP),
        "perceptual": str(base_models.TOWER),
        "conditioning": {"panorama_width": 256, "crops": 4},
        "fit": FIT,
    },
    "synthesize.yaml": {"data": {"block": 4}, "generate": {"steps": 2}},
    "matcher.yaml": {
        "pairs": "data/synthesized/train",
        "val": "data/synthesized/val",
        "tower": str(base_models.TOWER),
        "panorama": [64, 256],
        "polar": [64, 256],
        "square": 64,
        "hidden": 32,
        "fit": FIT,
    },
    "index.yaml": {"pool": {"size": 1}},
    "tune.yaml": {"trials": 2, "epochs": 1, "concurrent": 1},
}
"""The settings of configs/cvusa, of tiny pictures and toy models."""


def blocks(document: Path) -> list[tuple[str, str]]:
    """Kind and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)


def commands(script: str) -> list[str]:
    """The lines of a block, those that go on (`\\`) joined."""
    return [line for line in script.replace("\\\n", "").splitlines() if line.strip()]


def untyped(command: str) -> list[str]:
    return [start for start in UNTYPED if command.startswith(start)]


def scripts(document: Path) -> list[str]:
    return [text for kind, text in blocks(document) if kind == "sh"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, world_root, ray_session) -> tuple[Path, dict[str, str]]:
    """A folder like a fresh clone, and the environment of a shell in it."""
    at = tmp_path_factory.mktemp("clone")
    for name in ("cvmatch", "jobs", "configs", "Makefile", "cluster.yaml"):
        (at / name).symlink_to(ROOT / name)
    (at / ".venv").symlink_to(Path(sys.prefix))
    (at / "toy").mkdir()
    for name, settings in TOY.items():
        (at / "toy" / name).write_text(yaml.safe_dump(settings))
    panoramas = sorted(Path(world_root, "streetview").glob("*.jpg"))
    (at / "street.jpg").write_bytes(panoramas[-1].read_bytes())
    tiles = sorted(Path(world_root, "bingmap").rglob("*.png"))
    assert len(tiles) == 36
    _write_tiles(tiles[:24], at / "tiles")
    _write_tiles(tiles[24:], at / "new-tiles")
    (at / "gone.txt").write_text(f"{tiles[0].stem}\n{tiles[30].stem}\n")
    variables = {
        "CVUSA": str(world_root),
        "CONFIGS": str(at / "toy"),
        "TILES": str(at / "tiles"),
        "NEW_TILES": str(at / "new-tiles"),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    }
    return at, {**os.environ, **variables}


def _write_tiles(tiles: list[Path], output: Path) -> None:
    """Rows of a gallery near the place that the documents search."""
    rows = [
        {
            schema.PAIR_ID: tile.stem,
            schema.AERIAL: tile.read_bytes(),
            schema.LATITUDE: 46.95 + 0.001 * number,
            schema.LONGITUDE: 7.44,
        }
        for number, tile in enumerate(tiles)
    ]
    output.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), output / "tiles.parquet")


@pytest.mark.ray
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_runs_as_it_stands_there(document, clone):
    at, environment = clone
    for script in scripts(document):
        if any(untyped(command) for command in commands(script)):
            assert all(untyped(command) for command in commands(script)), script
            continue
        typed = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=at,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert typed.returncode == 0, f"{script}\n{typed.stdout[-3000:]}\n{typed.stderr[-6000:]}"


@pytest.mark.ray
def test_what_the_commands_of_the_readme_made_is_there(clone):
    at, _ = clone
    answers = pa.concat_tables(tables.batches(str(at / "data" / "found"), ["tiles"]))
    assert [len(tiles) for tiles in answers["tiles"].to_pylist()] == [10] * 12
    assert "<img" in (at / "found.html").read_text("utf-8")
    best = yaml.safe_load((at / "tuned" / "best.yaml").read_text())
    assert best["tower"] == TOY["matcher.yaml"]["tower"]
    assert (at / "models" / "tuned" / "model.safetensors").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_fence_their_blocks_and_say_what_they_hold(document):
    assert {kind for kind, _ in blocks(document)} <= KINDS
    unfenced = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.M | re.S)
    loose = re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/|python |make |ray |pip ).*", unfenced, re.M)
    assert not loose


def submitted() -> list[str]:
    every = [command for one in DOCUMENTS for text in scripts(one) for command in commands(text)]
    return [command for command in every if command.startswith("ray job submit")]


def test_jobs_that_are_submitted_to_a_cluster_have_flags_that_the_jobs_take():
    assert submitted()
    for command in submitted():
        words = shlex.split(command, comments=True)
        python, job, *flags = words[words.index("--") + 1 :]
        assert python == "python"
        config.parse(JOBS[Path(job).name], flags)


def test_commands_of_make_and_ray_that_are_not_typed_are_known_to_them():
    every = [command for one in DOCUMENTS for text in scripts(one) for command in commands(text)]
    assert set(UNTYPED) == {start for command in every for start in untyped(command)}
    for command in every:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] == "ray":
            name = words[1:3] if words[1] == "job" else words[1:2]
            told = subprocess.run(
                [str(Path(sys.prefix, "bin", "ray")), *name, "--help"],
                check=True,
                capture_output=True,
                text=True,
            )
            own = words[: words.index("--")] if "--" in words else words
            flags = [word for word in own if word.startswith("--")]
            assert all(flag in told.stdout for flag in flags), (command, told.stdout)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_the_documents_name_are_those_of_their_job(name):
    path = ROOT / "configs" / "cvusa" / name
    read = config.parse(CONFIGS[name], ["--config", str(path)])
    assert read != CONFIGS[name](), "they change nothing"
    assert {one.name for one in path.parent.iterdir()} == set(CONFIGS)
