"""A folder like a fresh clone, in which the commands of documents are typed as they stand there.

The fenced `sh` and `python` blocks of a document run in their order. The documents name by
variables (`CVUSA`, `CONFIGS`, ...) what differs from a user's case; here these are tiny data and
toy base models.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cvmatch.data import schema
from cvmatch.demo import models as base_models
from tests.helpers import imagery, own_pairs

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = ROOT / "README.md"

UNTYPED = {
    "make test": "is what runs this",
    "make install": "made what runs this",
    "make check": "continuous integration runs it beside the tests",
    "ray up": "starts machines in a cloud: tests/runtime/test_cluster.py checks the file",
    "ray dashboard": "needs that cluster",
    "ray get-auth-token": "writes the token of whoever types it",
    "ray start": "starts a node here: tests/cluster starts its own so",
    "ray job submit": "needs that cluster: tests/cluster types it, and the job's flags are parsed",
    "kubectl": "needs a cluster of Kubernetes: tests/deploy checks the files that it is given",
    "docker build": "needs Docker and 6 GB of packages: tests/deploy lints the file",
    "export RAY_AUTH_MODE": "would shut out this session's Ray",
    "export STORE": "names an object store: tests/cluster has one",
    "export RUNTIME": "goes with `ray job submit`",
}
"""Beginnings of commands that cannot run here, and what stands in for that."""

SHORTER = {"make demo": "cvmatch demo --preset tiny"}
"""Commands that take minutes, and what is typed in their place."""

FIT = {"epochs": 1, "batch": 4, "workers": 0}
TOY = {
    "segmenter.yaml": {"base": str(base_models.SEGFORMER), "size": 64, "fit": FIT},
    "generator.yaml": {
        "diffusion": str(base_models.DIFFUSION),
        "clip": str(base_models.CLIP),
        "lpips_vgg": str(base_models.TOWER),
        "conditioning": {"panorama_width": 256},
        "fit": FIT,
    },
    "synthesize.yaml": {"data": {"block": 4}, "generate": {"num_inference_steps": 2}},
    "matcher.yaml": {
        "pairs": "data/synthesized/train",
        "val": "data/synthesized/val",
        "tower": str(base_models.TOWER),
        "panorama": [64, 256],
        "tile_size": 64,
        "hidden": 32,
        "fit": FIT,
    },
    "index.yaml": {"pool": {"size": 1}},
    "tune.yaml": {"trials": 2, "epochs": 1, "concurrent": 1},
}
"""The settings of configs/cvusa, of tiny pictures and toy models."""


@dataclass(frozen=True)
class Clone:
    """A folder, and the environment of a shell in it."""

    folder: Path
    environment: dict[str, str]

    def run_document(self, document: Path) -> None:
        """Type every block of a document, and stop at the first that fails."""
        for kind, text in blocks(document):
            if kind == "python":
                self._run([sys.executable, "-c", text])
            elif kind == "sh" and not is_untyped(text):
                for command, shorter in SHORTER.items():
                    text = re.sub(f"^{command}.*$", shorter, text, flags=re.M)  # noqa: PLW2901
                self._run(["bash", "-euo", "pipefail", "-c", text])

    def _run(self, words: list[str]) -> None:
        typed = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        output = f"{typed.stdout[-3000:]}\n{typed.stderr[-6000:]}"
        assert typed.returncode == 0, f"{words[-1]}\n{output}"


def blocks(document: Path) -> list[tuple[str, str]]:
    """Kind and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)


def scripts(document: Path) -> list[str]:
    """Its `sh` blocks."""
    return [text for kind, text in blocks(document) if kind == "sh"]


def commands(script: str) -> list[str]:
    """The lines of a block, those that go on (`\\`) joined."""
    return [line for line in script.replace("\\\n", "").splitlines() if line.strip()]


def untyped(command: str) -> list[str]:
    """Those of UNTYPED with which a command begins."""
    return [start for start in UNTYPED if command.startswith(start)]


def is_untyped(script: str) -> bool:
    """Whether a block cannot run here; then it holds no command that only this block would type."""
    others = [command for command in commands(script) if not untyped(command)]
    if len(others) == len(commands(script)):
        return False
    assert all(command.startswith(tuple(SHORTER)) for command in others), script
    return True


def make_clone(folder: Path, world_root: str, ray_address: str) -> Clone:
    """A folder with the checkout's files, a virtual environment, settings and pictures."""
    for name in ("cvmatch", "jobs", "configs", "Makefile", "cluster.yaml"):
        (folder / name).symlink_to(ROOT / name)
    _write_environment(folder / ".venv" / "bin")
    (folder / "toy").mkdir()
    for name, settings in TOY.items():
        (folder / "toy" / name).write_text(yaml.safe_dump(settings))
    panoramas = sorted(Path(world_root, "streetview").glob("*.jpg"))
    (folder / "street.jpg").write_bytes(panoramas[-1].read_bytes())
    tiles = sorted(Path(world_root, "bingmap").rglob("*.png"))
    assert len(tiles) == 36
    _write_tiles(tiles[:24], folder / "tiles")
    _write_tiles(tiles[24:], folder / "new-tiles")
    mosaic = imagery.draw_mosaic(across=8)
    imagery.write_pmtiles(mosaic, folder / "city.pmtiles")
    imagery.write_region(folder / "canton.geojson", mosaic.bounds)
    (folder / "gone.txt").write_text(f"{tiles[0].stem}\n{tiles[30].stem}\n")
    own_pairs.write_world(Path(world_root), folder / "pairs")
    own_pairs.write_photos(mosaic, panoramas, folder / "photos", 60)
    variables = {
        "CVUSA": str(world_root),
        "CONFIGS": str(folder / "toy"),
        "MODELS": str(folder / "demo" / "models"),
        "TILES": str(folder / "tiles"),
        "NEW_TILES": str(folder / "new-tiles"),
        "PAIRS": str(folder / "pairs"),
        "PHOTOS": str(folder / "photos"),
        "RAY_ADDRESS": ray_address,
        "PATH": os.pathsep.join([str(folder / ".venv" / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    }
    return Clone(folder, {**os.environ, **variables})


def _write_environment(directory: Path) -> None:
    """What `make install` makes: `cvmatch` runs this checkout, wherever the tests' own one is."""
    directory.mkdir(parents=True)
    (directory / "python").symlink_to(sys.executable)
    (directory / "activate").write_text(f'export PATH="{directory}:$PATH"\n')
    script = directory / "cvmatch"
    script.write_text(f"#!{sys.executable}\nfrom cvmatch.cli import main\n\nmain()\n")
    script.chmod(0o755)


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
