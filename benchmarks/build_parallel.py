"""One worker, two, four, and workers killed in every stage: the same index, byte for byte."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from _harness import Bench, fill_sizes, parse_flags, write_results
from _memory import list_descendants
from index_1m import train_matcher

from cvmatch.data.settings import Ingest
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.index.build import build
from cvmatch.index.manifest import IndexManifest
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex, Verify
from cvmatch.index.verify import verify
from cvmatch.index.writer import encode_shard, write_shard
from cvmatch.match.infer import EmbedTile
from cvmatch.runtime import session
from cvmatch.runtime.settings import Pool

STAGES = {
    "embed": EmbedTile.__name__,
    "shards": write_shard.__name__,
    "codes": encode_shard.__name__,
}
"""Stage -> what the title of its workers holds."""


@dataclass(frozen=True, kw_only=True)
class BuildParallelBench(Bench):
    """Build an index of the same tiles again and again."""

    tiles: int = 0
    """Tiles; 0: 4,000, quick 480."""
    shards: int = 8
    """Shards of the index."""


@contextmanager
def kill_stage(title: str) -> Iterator[list[int]]:
    """SIGKILL the first worker of Ray that does the work `title`; gives the killed process."""
    killed: list[int] = []
    finished = threading.Event()

    def look() -> None:
        while not finished.wait(0.002):
            for pid in list_descendants(os.getpid()):
                if not killed and title in _read_title(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        finished.set()
        thread.join()


def _read_title(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            title = file.read().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return title if title.startswith("ray::") else ""


def read_checksums(info: IndexManifest) -> dict[str, str]:
    """Hashes of everything but what a version says of itself."""
    return {
        name: one.sha256 for name, one in info.files.items() if not name.startswith("versions/")
    }


def main(bench: BuildParallelBench) -> None:
    """Build all, and compare."""
    bench = fill_sizes(bench, {"tiles": 480 if bench.quick else 4_000})
    session.start(logical_cpus=8)
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        data = f"{at}/world"
        make_world(MakeWorld(output=data, preset="standard", train=bench.tiles, val=16))
        model, location = train_matcher(f"{at}/trained")

        def built(name: str, workers: int) -> tuple[IndexManifest, float]:
            config = BuildIndex(
                tiles=Ingest(root=data, split="train", block=32),
                model=model,
                output=f"{at}/{name}",
                queries=location,
                key="PQ64x4",
                pool=Pool(size=workers, batch=32),
            )
            begin = time.perf_counter()
            info = build(config, shard_rows=-(-bench.tiles // bench.shards))
            return info, time.perf_counter() - begin

        table, wanted, same = [], {}, []
        for workers in (1, 2, 4):
            info, seconds = built(f"workers-{workers}", workers)
            wanted = wanted or read_checksums(info)
            same.append(read_checksums(info) == wanted)
            table.append(
                _make_row(f"{workers} workers", info, seconds, same[-1], f"{at}/workers-{workers}")
            )
        for stage, title in STAGES.items():
            with kill_stage(title) as killed:
                info, seconds = built(f"killed-{stage}", 2)
            if not killed:
                raise SystemExit(f"no worker of {stage} was seen: nothing was killed.")
            same.append(read_checksums(info) == wanted)
            table.append(
                _make_row(
                    f"2 workers, one killed in {stage}",
                    info,
                    seconds,
                    same[-1],
                    f"{at}/killed-{stage}",
                )
            )
    figures = {"same": sum(same) / len(same), "builds": len(same)}
    notes = (
        f"{bench.tiles} tiles in {bench.shards} shards, 2 cores; a worker is a logical one. "
        "Files are the shards, the empty index, the codes, and the packed index; each hash is "
        "compared with that of the first row. `verify --deep` counts the tiles and makes all codes "
        "again. A killed worker gets SIGKILL when it is first seen at its stage.",
    )
    write_results(bench, "One index, however it is built", table, figures, notes)


def _make_row(
    name: str, info: IndexManifest, seconds: float, same: bool, place: str
) -> dict[str, Any]:
    found = verify(Verify(index=place, deep=True))
    ids = Index.open(place).tiles["pair_id"].to_pylist()
    return {
        "build": name,
        "seconds": seconds,
        "tiles": found.tiles,
        "ids twice": len(ids) - len(set(ids)),
        "rejected": info.rejected,
        "same files": f"{'all' if same else 'NOT ALL'} of {len(read_checksums(info))}",
    }


if __name__ == "__main__":
    main(parse_flags(BuildParallelBench))
