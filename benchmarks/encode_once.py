"""Training on stored encodings against encoding in every step: samples a second of both."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import _full_size
import _repeat
import torch
from _harness import Bench, finish, flags, sized
from torch import Tensor

from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.generate import pretrained
from cvmatch.generate.settings import Conditioning, TrainGenerator, Way
from cvmatch.generate.task import GeneratorTask
from cvmatch.generate.train import build_task, training_rows
from cvmatch.runtime import hardware, progress, session
from cvmatch.runtime.settings import Pool
from cvmatch.training.metrics import to_tensors

DRAWN = 128
"""Pairs that are drawn for the full size; more are these over and over."""


@dataclass(frozen=True, kw_only=True)
class EncodeBench(Bench):
    """Samples a second of the generator's training, with and without the stored encodings."""

    pairs: int = 0
    """Training pairs; 0: 960, quick 160, full size 16 (on a GPU 2,048: 128 over and over)."""
    batch: int = 0
    """Pairs a step; 0: 32, full size 4 (on a GPU 32)."""
    rounds: int = 0
    """How often both run an epoch, in turns; medians are reported. 0: 3, quick 2, full size 3."""
    full_size: bool = False
    """The published architectures with random weights in place of the toy models; takes 15 GB."""
    base: str = ""
    """Directory of these, written where it is not there; empty: they are deleted."""


def filled(asked: EncodeBench) -> EncodeBench:
    """The sizes that were asked for, or the usual ones."""
    usual = {"pairs": 960, "batch": 32, "rounds": 3}
    if asked.quick:
        usual |= {"pairs": 160, "rounds": 2}
    if asked.full_size:
        usual = {"pairs": 16, "batch": 4, "rounds": 3}
        if hardware.device().type == "cuda":
            # With 256 pairs the start of its stream was most of an epoch's time.
            usual |= {"pairs": 2048, "batch": 32}
    return sized(asked, usual)


def stream(config: TrainGenerator) -> Any:
    """The training's own rows."""
    sizes = pretrained.sizes(config.diffusion, config.clip, config.conditioning.panorama_width)
    return training_rows(config, PairDataset.open(config.data), sizes, config.turns, config.mirror)


def batches(rows: Any, batch: int) -> Iterator[dict[str, Tensor]]:
    """An epoch."""
    for found in rows.iter_torch_batches(batch_size=batch, collate_fn=to_tensors, drop_last=True):
        yield {**found, "epoch": torch.tensor(0)}


def speed(task: GeneratorTask, rows: Any, batch: int) -> float:
    """Samples a second of an epoch, the start of its stream and the reading included.

    A part of an epoch would not do: Ray reads ahead, and so during the other way's turn.
    """
    at, count = hardware.device(), 0
    optimizer = torch.optim.AdamW(task.groups())
    _full_size.wait(at)
    begin = time.perf_counter()
    for found in batches(rows, batch):
        step(task, {name: value.to(at, non_blocking=True) for name, value in found.items()})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count += len(found["key"])
    _full_size.wait(at)
    return count / (time.perf_counter() - begin)


def step(task: GeneratorTask, batch: dict[str, Tensor]) -> None:
    """Gradients of a batch, in the precision of the training loop."""
    at = hardware.device().type
    with torch.autocast(at, torch.bfloat16, enabled=at == "cuda"):
        loss = task(batch)["loss"]
    loss.backward()


def work(task: GeneratorTask, batch: dict[str, Tensor]) -> float:
    """FLOP a sample of a step's networks, both ways."""
    batch = {name: value.to(hardware.device()) for name, value in batch.items()}
    return _full_size.flops(lambda: step(task, batch)) / len(batch["key"])


def toy_settings(at: str) -> dict[str, TrainGenerator]:
    """The toy base models: fewer and fewer weights, then all with the two image terms."""
    base = TrainGenerator(
        data=Ingest(root=f"{at}/world"),
        diffusion=base_models.DIFFUSION,
        clip=base_models.CLIP,
        perceptual=base_models.TOWER,
        conditioning=Conditioning(panorama_width=256, crops=4),
        mirror=True,
        pretrain_rays=1,
        freeze_rays=True,
        encoded=f"{at}/encoded",
        encode_pool=Pool(size=2, batch=32),
    )
    noise = replace(base, w_clip=0.0, w_vae=0.0)
    return {
        "toy, noise term, all weights": noise,
        "toy, noise term, attention": replace(noise, train_unet="attention"),
        "toy, noise term, LoRA": replace(noise, train_unet="lora"),
        "toy, all three terms, all weights": base,
    }


def full_settings(at: str, full: str) -> dict[str, TrainGenerator]:
    """Stable Diffusion v1-4 and CLIP ViT-B/32 with random weights, which serve for speed."""
    _full_size.write_diffusion(full)
    gpus = torch.cuda.device_count()
    base = TrainGenerator(
        data=Ingest(root=f"{at}/world"),
        diffusion=full,
        clip=f"{full}/clip",
        w_clip=0.0,
        w_vae=0.0,
        pretrain_rays=1,
        freeze_rays=True,
        encoded=f"{at}/encoded",
        encode_pool=Pool(batch=32, calls=2, gpus=0.5) if gpus else Pool(batch=4),
    )
    return {
        "SD v1-4 at 256 pixels, noise term, all weights": base,
        "SD v1-4 at 256 pixels, noise term, LoRA": replace(base, train_unet="lora"),
    }


def compared(asked: EncodeBench, name: str, config: TrainGenerator, top: float) -> dict[str, Any]:
    """Both ways in turns; a row of the table. `top`: FLOP/s of the device."""
    rows = {way: stream(replace(config, encode=way)) for way in get_args(Way)}
    task = build_task(config).to(hardware.device()).train()
    every = config.image_every  # of so many steps one has the image terms
    needed = {
        way: sum(
            work(task, batch) for batch in itertools.islice(batches(found, asked.batch), every)
        )
        / every
        for way, found in rows.items()
    }
    found: dict[str, list[float]] = {way: [] for way in rows}
    done = [0]
    with progress.watch(name, 2 * asked.rounds, lambda: done[0]):
        for way in found:
            speed(task, rows[way], asked.batch)  # warm
        for _ in range(asked.rounds):
            for way, speeds in found.items():
                speeds.append(speed(task, rows[way], asked.batch))
                done[0] += 1
    once, live = (statistics.median(found[way]) for way in ("once", "live"))
    return {
        "training": name,
        "batch": asked.batch,
        "encoded once, samples/s": once,
        "live, samples/s": live,
        "once / live": once / live,
        "GFLOP a sample, once / live": f"{needed['once'] / 1e9:.3g} / {needed['live'] / 1e9:.3g}",
        "share of the peak, once": once * needed["once"] / top,
        "share of the peak, live": live * needed["live"] / top,
    }


def _precision() -> str:
    return "bf16" if hardware.device().type == "cuda" else "fp32"


def main(asked: EncodeBench) -> None:
    """Both ways in turns, in each setting."""
    session.start(logical_cpus=max(4, os.cpu_count() or 4))
    asked = filled(asked)
    top = _full_size.peak(hardware.device())
    table, figures = [], {"peak.tflops": top / 1e12}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        few = min(asked.pairs, DRAWN) if asked.full_size else asked.pairs
        make_world(MakeWorld(output=f"{at}/places", preset="standard", train=few, val=16))
        _repeat.links(f"{at}/places", f"{at}/world", asked.pairs)
        full = asked.base or f"{at}/full"
        settings = full_settings(at, full) if asked.full_size else toy_settings(at)
        for name, config in settings.items():
            row = compared(asked, name, config, top)
            table.append(row)
            key = name.split(", ", 1)[1].replace(", ", ".").replace(" ", "_")
            figures |= {f"{key}.once": row["encoded once, samples/s"]}
            figures |= {f"{key}.live": row["live, samples/s"], f"{key}.ratio": row["once / live"]}
    notes = (
        f"{asked.rounds} epochs of {asked.pairs} pairs each, in turns, medians. One process, "
        f"{torch.get_num_threads()} threads, {_precision()}; the rays are frozen, as after their "
        "own training. The reading of the batches is in the time, the pass that encodes is not.",
        f"The device's peak by a large matrix product: {top / 1e12:.3g} TFLOP/s. FLOP of "
        "convolutions, matrix products and attention, both ways.",
    )
    finish(asked, "Encode once against live", table, figures, notes)


if __name__ == "__main__":
    main(flags(EncodeBench))
