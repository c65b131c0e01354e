"""Training on stored encodings against encoding in every step: samples a second of both."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from _harness import Bench, finish, flags, sized
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cvmatch import engine, hardware, progress, toy
from cvmatch.engine import Pool
from cvmatch.generate import parts
from cvmatch.generate.condition import Conditioning
from cvmatch.generate.task import GeneratorTask
from cvmatch.generate.train import TrainGenerator, Way, build_task, training_rows
from cvmatch.ingest import Ingest
from cvmatch.training.meters import tensors
from cvmatch.world import MakeWorld, make_world


@dataclass(frozen=True, kw_only=True)
class EncodeBench(Bench):
    """Samples a second of the generator's training, with and without the stored encodings."""

    pairs: int = 0
    """Training pairs; 0: 960, quick 160, full size 16."""
    batch: int = 0
    """Pairs a step; 0: 32, full size 4."""
    rounds: int = 0
    """How often both run, in turns; medians are reported. 0: 5, quick 2, full size 3."""
    steps: int = 0
    """Steps of a round; 0: 12, quick 4, full size 2."""
    full_size: bool = False
    """The published architectures with random weights in place of the toy models; takes 15 GB."""


def filled(asked: EncodeBench) -> EncodeBench:
    """The sizes that were asked for, or the usual ones."""
    usual = {"pairs": 960, "batch": 32, "rounds": 5, "steps": 12}
    if asked.quick:
        usual |= {"pairs": 160, "rounds": 2, "steps": 4}
    if asked.full_size:
        usual = {"pairs": 16, "batch": 4, "rounds": 3, "steps": 2}
    return sized(asked, usual)


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


def toy_settings(at: str) -> dict[str, TrainGenerator]:
    """The toy base models, with the noise term alone and with the two image terms."""
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
    return {
        "toy, noise term alone": replace(base, w_clip=0.0, w_vae=0.0),
        "toy, all three terms": base,
    }


def full_settings(at: str) -> dict[str, TrainGenerator]:
    """Stable Diffusion v1-4 and CLIP ViT-B/32 with random weights, which serve for speed."""
    write_full(f"{at}/full")
    base = TrainGenerator(
        data=Ingest(root=f"{at}/world"),
        diffusion=f"{at}/full",
        clip=f"{at}/full/clip",
        w_clip=0.0,
        w_vae=0.0,
        pretrain_rays=1,
        freeze_rays=True,
        encoded=f"{at}/encoded",
        encode_pool=Pool(batch=4),
    )
    return {
        "SD v1-4 at 256 pixels, noise term, all weights": base,
        "SD v1-4 at 256 pixels, noise term, LoRA": replace(base, train_unet="lora"),
    }


def write_full(directory: str) -> None:
    """Base models of the published sizes, for tiles of 256 pixels, in the on-disk layout."""
    unet = UNet2DConditionModel(
        sample_size=32,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),  # pyright: ignore
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_pretrained(f"{directory}/{name}")
    CLIPVisionModel(CLIPVisionConfig(patch_size=32)).save_pretrained(f"{directory}/clip")
    CLIPImageProcessor().save_pretrained(f"{directory}/clip")


def compared(asked: EncodeBench, name: str, config: TrainGenerator) -> dict[str, Any]:
    """Both ways in turns; a row of the table."""
    rows = {way: batches(replace(config, encode=way), asked.batch) for way in get_args(Way)}
    task = build_task(config).train()
    found: dict[str, list[float]] = {way: [] for way in rows}
    done = [0]
    with progress.watch(name, 2 * asked.rounds, lambda: done[0]):
        for way in found:
            speed(task, rows[way], 1)  # warm; the first batch of "once" waits for the pass
        for _ in range(asked.rounds):
            for way, speeds in found.items():
                speeds.append(speed(task, rows[way], asked.steps))
                done[0] += 1
    once, live = (statistics.median(found[way]) for way in ("once", "live"))
    return {
        "training": name,
        "batch": asked.batch,
        "encoded once, samples/s": once,
        "live, samples/s": live,
        "once / live": once / live,
    }


def main(asked: EncodeBench) -> None:
    """Both ways in turns, in each setting."""
    engine.start(logical_cpus=4)
    hardware.keep_memory()
    asked = filled(asked)
    table, figures = [], {}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        make_world(MakeWorld(output=f"{at}/world", preset="standard", train=asked.pairs, val=16))
        settings = full_settings(at) if asked.full_size else toy_settings(at)
        for name, config in settings.items():
            row = compared(asked, name, config)
            table.append(row)
            key = name.split(", ")[-1].split()[0]
            figures |= {f"{key}.once": row["encoded once, samples/s"]}
            figures |= {f"{key}.live": row["live, samples/s"], f"{key}.ratio": row["once / live"]}
    notes = (
        f"{asked.rounds} rounds of {asked.steps} steps in turns, medians. One process, "
        f"{torch.get_num_threads()} threads, fp32; the rays are frozen, as after their own "
        "training. The reading of the batches is in the time, the pass that encodes is not.",
    )
    finish(asked, "Encode once against live", table, figures, notes)


if __name__ == "__main__":
    main(flags(EncodeBench))
