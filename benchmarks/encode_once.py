"""Training on stored encodings against encoding in every step: samples a second of both."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from _harness import Bench, finish, flags
from torch import Tensor

from cvmatch import engine, progress, toy
from cvmatch.engine import Pool
from cvmatch.generate import parts
from cvmatch.generate.condition import Conditioning
from cvmatch.generate.task import GeneratorTask
from cvmatch.generate.train import TrainGenerator, build_task, training_rows
from cvmatch.ingest import Ingest
from cvmatch.training.meters import tensors
from cvmatch.world import MakeWorld, make_world


@dataclass(frozen=True, kw_only=True)
class EncodeBench(Bench):
    """Samples a second of the generator's training, with and without the stored encodings."""

    pairs: int = 0
    """Training pairs; 0: 960, quick 160."""
    batch: int = 32
    """Pairs a step."""
    rounds: int = 0
    """How often both run, in turns; medians are reported. 0: 5, quick 2."""
    steps: int = 0
    """Steps of a round; 0: 12, quick 4."""


def batches(config: TrainGenerator, batch: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the training's own rows, again and again, with the epoch."""
    sizes = parts.sizes(config.diffusion, config.clip, config.conditioning.panorama_width)
    rows: Any = training_rows(config, config.data, sizes, config.turns, config.mirror)
    for epoch in itertools.count():
        for found in rows.iter_torch_batches(batch_size=batch, collate_fn=tensors, drop_last=True):
            yield {**found, "epoch": torch.tensor(epoch)}


def speed(task: GeneratorTask, rows: Iterator[dict[str, Tensor]], steps: int) -> float:
    """Samples a second of `steps` steps, the reading of their batches included."""
    optimizer = torch.optim.AdamW(task.groups())
    count = 0
    begin = time.perf_counter()
    for batch in itertools.islice(rows, steps):
        optimizer.zero_grad(set_to_none=True)
        task(batch)["loss"].backward()
        optimizer.step()
        count += len(batch["key"])
    return count / (time.perf_counter() - begin)


def main(asked: EncodeBench) -> None:
    """Both ways in turns, with and without the two image terms."""
    pairs = asked.pairs or (160 if asked.quick else 960)
    rounds = asked.rounds or (2 if asked.quick else 5)
    steps = asked.steps or (4 if asked.quick else 12)
    engine.start(logical_cpus=4)
    engine.keep_memory()
    table, figures = [], {}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        make_world(MakeWorld(output=f"{at}/world", preset="standard", train=pairs, val=16))
        base = TrainGenerator(
            data=Ingest(root=f"{at}/world"),
            diffusion=toy.DIFFUSION,
            clip=toy.CLIP,
            perceptual=toy.TOWER,
            conditioning=Conditioning(panorama_width=256, crops=4),
            mirror=True,
            pretrain_rays=1,
            freeze_rays=True,
            encoded=f"{at}/encoded",
            encode_pool=Pool(size=2, batch=32),
        )
        begin = time.perf_counter()
        rows = {"once": batches(base, asked.batch)}
        next(rows["once"])
        passing = time.perf_counter() - begin
        rows["live"] = batches(replace(base, encode="live"), asked.batch)
        settings = {
            "noise term alone": replace(base, w_clip=0.0, w_vae=0.0),
            "all three terms": base,
        }
        for name, config in settings.items():
            task = build_task(config).train()
            found: dict[str, list[float]] = {"once": [], "live": []}
            done = [0]
            with progress.watch(name, 2 * rounds, lambda done=done: done[0]):
                for way in found:
                    speed(task, rows[way], 1)  # warm
                for _ in range(rounds):
                    for way, speeds in found.items():
                        speeds.append(speed(task, rows[way], steps))
                        done[0] += 1
            once, live = (statistics.median(found[way]) for way in ("once", "live"))
            table.append(
                {
                    "losses": name,
                    "encoded once, samples/s": once,
                    "live, samples/s": live,
                    "once / live": once / live,
                }
            )
            key = name.split()[0]
            figures |= {f"{key}.once": once, f"{key}.live": live, f"{key}.ratio": once / live}
    figures |= {"pass.rows_per_s": pairs / passing}
    notes = (
        f"{pairs} pairs, each with its mirror image, batches of {asked.batch}, {rounds} rounds of "
        f"{steps} steps in turns, medians. One process, {torch.get_num_threads()} threads, fp32, "
        "toy base models; the rays are frozen, as after their own training.",
        f"The pass before took {passing:.0f} s with two actors, their start included. It pays "
        "after as many epochs as its time is of what an epoch saves.",
    )
    finish(asked, "Encode once against live", table, figures, notes)


if __name__ == "__main__":
    main(flags(EncodeBench))
