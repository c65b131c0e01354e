"""The actor pools against a bare loop: the same actor on the same batches, with and without Ray."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from cvmatch.world import MakeWorld, make_world

Batch = dict[str, np.ndarray]

WARM = 2
"""Blocks that come before the clock of a pool starts: its processes start, and load the model."""


@dataclass(frozen=True, kw_only=True)
class Stream(Bench):
    """Rows a second of one actor in a Ray Data stream, and of the same actor called in a loop."""

    pairs: int = 0
    """Pairs; 0: 640, quick 160."""
    batch: int = 16
    """Rows a call, in both."""
    rounds: int = 0
    """How often both run, in turns; medians are reported. 0: 3, quick 1."""


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


def stages(models: str, data: Ingest, batch: int) -> list[Stage]:
    """Generation and segmentation, with toy models of random new weights: speed needs no more."""
    conditioning = Conditioning(panorama_width=256, crops=4)
    Generator.base(toy.DIFFUSION, toy.CLIP, conditioning).save(f"{models}/generator")
    Segmenter.from_base(toy.SEGFORMER, Preprocess(size=128)).save(f"{models}/segmenter")
    draw = Generate(model=f"{models}/generator", steps=3, guidance=3.0, pool=Pool(batch=batch))
    label = Segment(model=f"{models}/segmenter", source="aerial", pool=Pool(batch=batch))
    return [
        Stage(
            "generate",
            lambda: GenerateAerial(draw.model, draw.steps, draw.guidance, draw.seed),
            lambda: generate(ingest(data), draw),
        ),
        Stage(
            "segment",
            lambda: SegmentAerial(label.model, label.source),
            lambda: segment(ingest(data), label),
        ),
    ]


def main(asked: Stream) -> None:
    """Both ways, in turns."""
    pairs = asked.pairs or (160 if asked.quick else 640)
    rounds = asked.rounds or (1 if asked.quick else 3)
    engine.start(logical_cpus=4)
    with tempfile.TemporaryDirectory() as at:
        make_world(MakeWorld(output=f"{at}/world", train=pairs, val=16))
        data = Ingest(root=f"{at}/world", block=asked.batch)
        batches: list = list(
            ingest(data).iter_batches(batch_size=asked.batch, batch_format="numpy")
        )
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
        f"{pairs} pairs (tiles 128 x 128, panoramas 64 x 256), batches of {asked.batch}, "
        f"{rounds} rounds in turns, medians. Toy models; 3 sampling steps with guidance.",
        "One actor, one thread, in both. The loop has its batches in memory; the pool reads, "
        "schedules and hands on its blocks in other processes meanwhile. Its start is not counted.",
    )
    finish(asked, "Actor pool against bare loop", rows, figures, notes)


if __name__ == "__main__":
    main(flags(Stream))
