"""The actor pools against a bare loop: the same actor on the same batches, with and without Ray.

With `--memory`, instead: the peak memory of `synthesize`, over some rows and ten times as many.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import _memory
import numpy as np
import torch
from _harness import Bench, finish, flags
from ray.data import Dataset

from cvmatch import engine, progress, toy
from cvmatch.engine import Pool
from cvmatch.generate.condition import Conditioning
from cvmatch.generate.infer import Generate, GenerateAerial, generate
from cvmatch.generate.model import Generator
from cvmatch.ingest import Ingest, ingest
from cvmatch.segment.infer import Segment, SegmentAerial, segment
from cvmatch.segment.model import Preprocess, Segmenter
from cvmatch.synthesize import Synthesize, synthesize
from cvmatch.world import MakeWorld, make_world

Batch = dict[str, np.ndarray]

WARM = 2
"""Blocks that come before the clock of a pool starts: its processes start, and load the model."""


BATCHES = 4
"""Batches of a block. A block costs Ray some 20 ms, whatever it holds."""


@dataclass(frozen=True, kw_only=True)
class Stream(Bench):
    """Rows a second of one actor in a Ray Data stream, and of the same actor called in a loop."""

    pairs: int = 0
    """Pairs; 0: 640, quick 448."""
    batch: int = 16
    """Rows a call, in both."""
    rounds: int = 0
    """How often both run, in turns; medians are reported. 0: 3, quick 1."""
    memory: bool = False
    """Compare the memory of long and short runs, and no speeds. 1,000 rows, quick 100, and ten
    times as many; or `pairs`."""


@dataclass(frozen=True)
class Stage:
    """One stage, both ways."""

    name: str
    actor: Callable[[], Callable[[Batch], Batch]]
    stream: Callable[[], Dataset]


def bare(stage: Stage, batches: Sequence[Batch]) -> float:
    """Rows a second of the actor in this process, on one thread as Ray gives an actor."""
    actor = stage.actor()
    torch.set_num_threads(1)
    actor(batches[0])
    rest = batches[1:]
    begin = time.perf_counter()
    for batch in rest:
        actor(batch)
    return sum(len(batch["pair_id"]) for batch in rest) / (time.perf_counter() - begin)


def pooled(stage: Stage) -> float:
    """Rows a second of the stream, from its second block to its last but one.

    Ray hands on a block when the next one is there, so the last comes together with the one before.
    """
    arrived = []
    for batch in stage.stream().iter_batches(batch_size=None, batch_format="numpy"):
        arrived.append((time.perf_counter(), len(batch["pair_id"])))
    rows = sum(count for _, count in arrived[WARM:-1])
    return rows / (arrived[-2][0] - arrived[WARM - 1][0])


def compared(stage: Stage, batches: Sequence[Batch], rounds: int) -> tuple[float, float]:
    """Median rows a second of the loop and of the pool, which run in turns."""
    loops, pools = [], []
    with progress.watch(stage.name, 2 * rounds, lambda: len(loops) + len(pools)):
        for _ in range(rounds):
            loops.append(bare(stage, batches))
            pools.append(pooled(stage))
    return statistics.median(loops), statistics.median(pools)


def models(at: str) -> None:
    """Toy models of random new weights: speed and memory need no more."""
    conditioning = Conditioning(panorama_width=256, crops=4)
    Generator.base(toy.DIFFUSION, toy.CLIP, conditioning).save(f"{at}/generator")
    Segmenter.from_base(toy.SEGFORMER, Preprocess(size=128)).save(f"{at}/segmenter")


def stages(at: str, data: Ingest, batch: int) -> list[Stage]:
    """Generation and segmentation."""
    pool = Pool(batch=batch)
    draw = Generate(model=f"{at}/generator", steps=3, guidance=3.0, pool=pool)
    label = Segment(model=f"{at}/segmenter", source="aerial", pool=pool)
    return [
        Stage(
            "generate",
            lambda: GenerateAerial(draw.model, draw.steps, draw.guidance, draw.seed, batch),
            lambda: generate(ingest(data), draw),
        ),
        Stage(
            "segment",
            lambda: SegmentAerial(label.model, label.source, batch=batch),
            lambda: segment(ingest(data), label),
        ),
    ]


def speed(asked: Stream, at: str) -> None:
    """Both ways, in turns."""
    pairs = asked.pairs or (448 if asked.quick else 640)
    rounds = asked.rounds or (1 if asked.quick else 3)
    make_world(MakeWorld(output=f"{at}/world", train=pairs, val=16))
    data = Ingest(root=f"{at}/world", block=BATCHES * asked.batch)
    batches: list = list(ingest(data).iter_batches(batch_size=asked.batch, batch_format="numpy"))
    plan = stages(at, data, asked.batch)
    speeds = [(stage.name, *compared(stage, batches, rounds)) for stage in plan]
    rows = [
        {
            "stage": name,
            "bare loop, rows/s": loop,
            "pool of one, rows/s": pool,
            "pool / loop": pool / loop,
        }
        for name, loop, pool in speeds
    ]
    figures = {}
    for name, loop, pool in speeds:
        figures |= {f"{name}.bare": loop, f"{name}.pool": pool, f"{name}.ratio": pool / loop}
    notes = (
        f"{pairs} pairs (tiles 128 x 128, panoramas 64 x 256), batches of {asked.batch} in "
        f"blocks of {BATCHES * asked.batch}, {rounds} rounds in turns, medians. "
        "Toy models; 3 sampling steps with guidance.",
        "One actor, one thread, in both. The loop has its batches in memory; the pool reads, "
        "schedules and hands on its blocks in other processes meanwhile. Its start is not counted.",
    )
    finish(asked, "Actor pool against bare loop", rows, figures, notes)


def repeat(root: str, to: str, rows: int) -> None:
    """A training split of `rows` pairs below `to`, whose pictures are links to those at `root`."""
    folders = {"bingmap": "input{}.png", "streetview": "{}.jpg", "segmap": "output{}.png"}
    count = len(os.listdir(f"{root}/bingmap"))
    for folder, name in folders.items():
        os.makedirs(f"{to}/{folder}")
        for row in range(rows):
            source = os.path.join(root, folder, name.format(f"{row % count + 1:07d}"))
            os.link(source, os.path.join(to, folder, name.format(f"{row + 1:07d}")))
    ids = [f"{row + 1:07d}" for row in range(rows)]
    lines = [f"bingmap/input{i}.png,streetview/{i}.jpg,segmap/output{i}.png\n" for i in ids]
    with open(f"{to}/train-19zl.csv", "w", encoding="utf-8") as file:
        file.writelines(lines)


def memory(asked: Stream, at: str) -> None:
    """Peaks of `synthesize` over few and many rows, after a run that warms Ray up."""
    few = asked.pairs or (100 if asked.quick else 1000)
    make_world(MakeWorld(output=f"{at}/world", preset="tiny"))
    repeat(f"{at}/world", f"{at}/many", 10 * few)
    rows = []
    for name, count in (("warm", few), ("few", few), ("many", 10 * few)):
        config = Synthesize(
            data=Ingest(root=f"{at}/many", cache=f"{at}/cache", limit=count),
            generate=Generate(model=f"{at}/generator", steps=1, guidance=1.0),
            segment=Segment(model=f"{at}/segmenter", pool=Pool(batch=32)),
            output=f"{at}/{name}",
        )
        with _memory.watched() as peak:
            synthesize(config)
        if name != "warm":
            rows.append({"rows": count, "peak, MiB": peak.mib})
    first, last = (row["peak, MiB"] for row in rows)
    notes = (
        "Peak of the sum over the driver, Ray's processes, its workers and its object store, each "
        "page once, looked at every second, during `synthesize` with its check of the pictures. "
        "The rows are 36 pairs over and over (tiles 64 x 64); toy models, 1 sampling step.",
    )
    figures = {"few": first, "many": last, "ratio": last / first}
    finish(asked, "Memory of a long stream", rows, figures, notes)


def main(asked: Stream) -> None:
    """What is asked."""
    # Ray's workers yield to other processes, which on a busy machine the loop would not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    engine.start(logical_cpus=4)
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        models(at)
        (memory if asked.memory else speed)(asked, at)


if __name__ == "__main__":
    main(flags(Stream))
