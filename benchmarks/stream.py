"""The actor pools against a bare loop: the same actor on the same batches, with and without Ray.

With `--memory`, instead: the peak memory of `synthesize`, over some rows and ten times as many.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import _full_size
import _memory
import _repeat
import numpy as np
import torch
from _harness import Bench, parse_flags, write_results
from ray.data import Dataset

from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.generate.infer import GenerateAerial, generate
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Generate
from cvmatch.runtime import progress, session
from cvmatch.runtime.settings import Pool
from cvmatch.segment.infer import SegmentAerial, segment
from cvmatch.segment.model import Preprocess, Segmenter
from cvmatch.segment.settings import Segment
from cvmatch.synthesize.run import synthesize
from cvmatch.synthesize.settings import Synthesize

Batch = dict[str, np.ndarray]

WARM = 2
"""Blocks that come before the clock of a pool starts: its processes start, and load the model."""


BATCHES = 4
"""Batches of a block. A block costs Ray some 20 ms, whatever it holds."""


@dataclass(frozen=True, kw_only=True)
class StreamBench(Bench):
    """Rows a second of one actor in a Ray Data stream, and of the same actor called in a loop."""

    pairs: int = 0
    """Pairs; 0: 640, quick 448, full size 128 over and over (on a GPU)."""
    batch: int = 16
    """Rows a call, in both."""
    rounds: int = 0
    """How often both run, in turns; medians are reported. 0: 3, quick 1."""
    full_size: bool = False
    """The published architectures with random weights, on pictures of CVUSA's sizes."""
    base: str = ""
    """Directory of these, written where it is not there; empty: they are deleted."""
    memory: bool = False
    """Compare the memory of long and short runs, and no speeds. 1,000 rows, quick 100, and ten
    times as many; or `pairs`."""


@dataclass(frozen=True)
class Stage:
    """One stage, both ways."""

    name: str
    actor: Callable[[], Callable[[Batch], Batch]]
    stream: Callable[[], Dataset]


def run_loop(stage: Stage, batches: Sequence[Batch]) -> float:
    """Rows a second of the actor in this process, on one thread as Ray gives an actor."""
    actor = stage.actor()
    torch.set_num_threads(1)
    actor(batches[0])
    rest = batches[1:]
    begin = time.perf_counter()
    for batch in rest:
        actor(batch)
    return sum(len(batch["pair_id"]) for batch in rest) / (time.perf_counter() - begin)


def run_pool(stage: Stage) -> float:
    """Rows a second of the stream, from its second block to its last but one.

    Ray hands on a block when the next one is there, so the last comes together with the one before.
    """
    arrived = []
    for batch in stage.stream().iter_batches(batch_size=None, batch_format="numpy"):
        arrived.append((time.perf_counter(), len(batch["pair_id"])))
    rows = sum(count for _, count in arrived[WARM:-1])
    return rows / (arrived[-2][0] - arrived[WARM - 1][0])


def compare(stage: Stage, batches: Sequence[Batch], rounds: int) -> tuple[float, float]:
    """Median rows a second of the loop and of the pool, which run in turns."""
    loops, pools = [], []
    with progress.watch(stage.name, 2 * rounds, lambda: len(loops) + len(pools)):
        for _ in range(rounds):
            loops.append(run_loop(stage, batches))
            pools.append(run_pool(stage))
    return statistics.median(loops), statistics.median(pools)


def write_models(bench: StreamBench, at: str) -> None:
    """Models of random new weights: speed and memory need no more."""
    if bench.full_size:
        base = bench.base or f"{at}/full"
        _full_size.write_diffusion(base)
        _full_size.write_segformer(f"{at}/segformer")
        Generator.base(base, f"{base}/clip").save(f"{at}/generator")
        Segmenter.from_base(f"{at}/segformer", Preprocess()).save(f"{at}/segmenter")
    else:
        conditioning = Conditioning(panorama_width=256)
        Generator.base(base_models.DIFFUSION, base_models.CLIP, conditioning).save(
            f"{at}/generator"
        )
        Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=128)).save(f"{at}/segmenter")


def list_stages(at: str, data: Ingest, batch: int) -> list[Stage]:
    """Generation and segmentation, each on a GPU where there is one."""
    gpus = min(1, torch.cuda.device_count())
    pool = Pool(batch=batch, calls=1 + gpus, gpus=gpus)
    draw = Generate(model=f"{at}/generator", num_inference_steps=3, guidance_scale=3.0, pool=pool)
    label = Segment(model=f"{at}/segmenter", source="aerial", pool=pool)
    return [
        Stage(
            "generate",
            lambda: GenerateAerial(draw.model, draw, batch),
            lambda: generate(PairDataset.open(data).rows(), draw),
        ),
        Stage(
            "segment",
            lambda: SegmentAerial(label.model, label.source, batch=batch),
            lambda: segment(PairDataset.open(data).rows(), label),
        ),
    ]


def measure_speed(bench: StreamBench, at: str) -> None:
    """Both ways, in turns."""
    pairs = bench.pairs or (448 if bench.quick else 640)
    rounds = bench.rounds or (1 if bench.quick else 3)
    root = make_data(bench, at, pairs)
    data = Ingest(root=root, block=BATCHES * bench.batch)
    batches: list = list(
        PairDataset.open(data).rows().iter_batches(batch_size=bench.batch, batch_format="numpy")
    )
    plan = list_stages(at, data, bench.batch)
    speeds = [(stage.name, *compare(stage, batches, rounds)) for stage in plan]
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
        f"{pairs} pairs, batches of {bench.batch} in blocks of {BATCHES * bench.batch}, {rounds} "
        "rounds in turns, medians. 3 sampling steps with guidance. "
        + (
            "Stable Diffusion v1-4, CLIP ViT-B/32 and SegFormer B3; tiles 370 x 370, drawn and "
            "segmented at 256 and 512, panoramas 224 x 1232."
            if bench.full_size
            else "Toy models; tiles 128 x 128, panoramas 64 x 256."
        ),
        "One actor, one thread, in both; on a GPU the pool's actor decodes and encodes in a second "
        "one. The loop has its batches in memory; the pool reads, schedules and hands on its "
        "blocks in other processes meanwhile. Its start is not counted.",
    )
    write_results(bench, "Actor pool against bare loop", rows, figures, notes)


def make_data(bench: StreamBench, at: str, pairs: int) -> str:
    """A data set of so many pairs; at full size few places over and over."""
    if not bench.full_size:
        make_world(MakeWorld(output=f"{at}/world", train=pairs, val=16))
        return f"{at}/world"
    make_world(MakeWorld(output=f"{at}/world", preset="large", train=min(pairs, 128), val=16))
    _repeat.link_rows(f"{at}/world", f"{at}/many", pairs)
    return f"{at}/many"


def measure_memory(bench: StreamBench, at: str) -> None:
    """Peaks of `synthesize` over few and many rows, after a run that warms Ray up."""
    few = bench.pairs or (100 if bench.quick else 1000)
    make_world(MakeWorld(output=f"{at}/world", preset="tiny"))
    _repeat.link_rows(f"{at}/world", f"{at}/many", 10 * few)
    rows = []
    for name, count in (("warm", few), ("few", few), ("many", 10 * few)):
        config = Synthesize(
            data=Ingest(root=f"{at}/many", cache=f"{at}/cache", limit=count),
            generate=Generate(model=f"{at}/generator", num_inference_steps=1, guidance_scale=1.0),
            segment=Segment(model=f"{at}/segmenter", pool=Pool(batch=32)),
            output=f"{at}/{name}",
        )
        with _memory.watch_memory() as peak:
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
    write_results(bench, "Memory of a long stream", rows, figures, notes)


def main(bench: StreamBench) -> None:
    """Measure, and write the table."""
    # Ray's workers yield to other processes, which on a busy machine the loop would not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    session.start(logical_cpus=max(4, os.cpu_count() or 4))
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        write_models(bench, at)
        (measure_memory if bench.memory else measure_speed)(bench, at)


if __name__ == "__main__":
    main(parse_flags(StreamBench))
