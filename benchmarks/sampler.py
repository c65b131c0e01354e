"""Sampling: what steps, guidance and batches cost and bring, against one picture at a time."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import _full_size
import numpy as np
import torch
from _harness import Bench, format_interval, parse_flags, write_results
from diffusers import DDIMScheduler
from jaxtyping import Float, Int64
from torch import Tensor

from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.evaluate import generation
from cvmatch.generate.batches import ImageSizes, decode_pairs
from cvmatch.generate.diffusion import guide_low_freq
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Sampling
from cvmatch.nn import metrics, rng
from cvmatch.runtime import hardware, progress, session

DEFAULT = Sampling()
"""The default sampler."""

PROTOTYPE = 50
"""DDIM steps of the published prototype, which draws one picture at a time in single precision."""

GRID = (
    *((2, 8.0, 0.0), (6, 1.0, 0.0), (6, 3.0, 0.0), (6, 8.0, 0.0), (12, 3.0, 0.0)),
    *((3, 8.0, 0.45), (4, 8.0, 0.45), (6, 4.0, 0.45), (6, 6.0, 0.45), (6, 12.0, 0.45)),
    *((6, 8.0, 0.7), (12, 8.0, 0.45)),
)
"""Steps, guidance scale and guidance interval of the batched sampler."""

RECALLS = ("recall@1", "recall@1%", "recall@10%")

Draw = Callable[[Float[Tensor, "row 3 h w"], Int64[Tensor, " row"]], Float[Tensor, "row 3 s s"]]


@dataclass(frozen=True, kw_only=True)
class SamplerBench(Bench):
    """Pictures a second, and how well they find their tiles; `generator` needs its `data`."""

    data: str = ""
    """Data set whose split `val` is drawn; empty: a world is made for the run."""
    generator: str = ""
    """Trained generator (toy sizes); empty: an untrained one, whose pictures find nothing."""
    held_out: int = 0
    """Pairs that the batched sampler draws; 0: 500, quick 96."""
    one_by_one: int = 0
    """Pairs that the loop draws, one by one; 0: 500, quick 24."""
    batch: int = 32
    """Pictures a call of the batched sampler."""
    full_size: bool = False
    """Only speed: the published architectures with random weights, on noise as panoramas."""
    base: str = ""
    """Directory of these, written where it is not there; empty: they are deleted."""


def build_ddim(model: Generator, guidance: float) -> Draw:
    """What the prototype does for a picture, with our conditioning: DDIM, two passes a step."""

    @torch.no_grad()
    def draw(panorama: Tensor, keys: Tensor) -> Tensor:
        condition = model.condition(model.encoders.encode_panorama(panorama))
        keep = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        null = model.conditioner.drop(condition, keep)
        scheduler: Any = DDIMScheduler.from_config(model.schedule.scheduler.config)
        scheduler.set_timesteps(PROTOTYPE)
        target = model.low_freq_target(condition)
        latent = rng.normal(keys, rng.fold_in(0, purpose="sample"), *model.latent_shape)
        for step in scheduler.timesteps:
            timestep = torch.full_like(keys, int(step))
            cond, uncond = (model.predict(latent, timestep, c) for c in (condition, null))
            pred = uncond + guidance * (cond - uncond)
            pred = guide_low_freq(model.schedule, latent, pred, int(step), target)
            latent = scheduler.step(pred, step, latent).prev_sample
        return model.encoders.decode(latent).clamp(0, 1)

    return draw


def measure(
    name: str, draw: Draw, pairs: dict[str, Tensor], batch: int
) -> tuple[dict[str, Any], float]:
    """A row of the table, and pictures a second."""
    drawn: list[Tensor] = []
    draw(pairs["ground"][:batch], pairs["key"][:batch])  # warm
    begin = time.perf_counter()
    with progress.watch(name, len(pairs["key"]), lambda: sum(map(len, drawn))):
        for ground, key in zip(
            pairs["ground"].split(batch), pairs["key"].split(batch), strict=True
        ):
            drawn.append(draw(ground, key))
    speed = len(pairs["key"]) / (time.perf_counter() - begin)
    pictures, true = torch.cat(drawn), pairs["aerial"]
    found = generation.retrieve_by_ncc(metrics.planes(pictures), metrics.planes(true)).to_json()
    return {
        "sampler": name,
        "pictures": len(true),
        "pictures/s": speed,
        **{f"{at.replace('recall', 'R')}, %": format_interval(found, at) for at in RECALLS},
        "NCC": metrics.ncc(pictures, true).mean().item(),
        "SSIM": metrics.ssim(pictures, true).mean().item(),
        "contrast": pictures.std(dim=(2, 3)).mean().item(),
    }, speed


def read_held_out(root: str, count: int, model: Generator) -> dict[str, Tensor]:
    """Decoded pairs; pictures in [0, 1]."""
    sizes = ImageSizes(model.panorama_size, model.tile_size, model.latent_shape[1])
    rows = PairDataset.open(Ingest(root=root, split="val", limit=count)).rows()
    found = decode_pairs(
        cast(dict[str, np.ndarray], rows.take_batch(count, batch_format="numpy")), sizes
    )
    tensors = {name: torch.from_numpy(values.copy()) for name, values in found.items()}
    tensors = {n: v.float() / 255 if v.dtype == torch.uint8 else v for n, v in tensors.items()}
    return {name: value.to(model.device) for name, value in tensors.items()}


def main(bench: SamplerBench) -> None:
    """Measure, and write the table."""
    if bench.generator and not bench.data:
        raise SystemExit(
            "sampler: --generator needs the --data that it was trained on: another world may hold "
            "the same places in its split val."
        )
    (measure_full_size if bench.full_size else measure_grid)(bench)


def measure_full_size(bench: SamplerBench) -> None:
    """The loop and the batched sampler in several forms; no picture means anything."""
    device = hardware.device()
    top = _full_size.peak_flops(device)
    with tempfile.TemporaryDirectory() as at:
        base = bench.base or f"{at}/full"
        _full_size.write_diffusion(base)
        model = Generator.base(base, f"{base}/clip").to(device).eval()
    rows = []
    for name, draw, batch in list_samplers(model, bench.batch):
        panorama = torch.rand(batch, 3, *model.panorama_size, device=device)
        keys = torch.arange(batch, device=device)
        needed = _full_size.count_flops(lambda d=draw, p=panorama, k=keys: d(p, k)) / batch
        times = [_full_size.time_call(lambda: draw(panorama, keys), device) for _ in range(4)]  # noqa: B023
        speed = batch / statistics.median(times[1:])
        rows.append(
            {
                "sampler": name,
                "batch": batch,
                "pictures/s": speed,
                "TFLOP a picture": needed / 1e12,
                "share of the peak": speed * needed / top,
            }
        )
    loop, chosen = rows[0]["pictures/s"], rows[1]["pictures/s"]
    figures = {"peak.tflops": top / 1e12, "loop.pictures_per_s": loop}
    figures |= {"default.pictures_per_s": chosen, "default.ratio": chosen / loop}
    notes = (
        f"Stable Diffusion v1-4 and CLIP ViT-B/32 at full size, random weights, tiles of "
        f"{model.tile_size} pixels, panoramas of {model.panorama_size}; default: "
        f"{DEFAULT.describe()}. "
        "The loop is in fp32, the batched sampler in bf16 on a GPU. Medians of three calls.",
        f"The device's peak by a large matrix product: {top / 1e12:.3g} TFLOP/s.",
    )
    write_results(bench, "Sampler at full size", rows, figures, notes)


def list_samplers(model: Generator, batch: int) -> Iterator[tuple[str, Draw, int]]:
    """Name, sampler and pictures a call; the last form changes the model."""

    def batched(steps: int) -> Draw:
        sampling = dataclasses.replace(DEFAULT, num_inference_steps=steps)
        return lambda ground, key: model.sample(ground, key, sampling)

    yield (
        f"one picture at a time, {PROTOTYPE} DDIM steps, fp32",
        build_ddim(model, DEFAULT.guidance_scale),
        1,
    )
    for size in (batch, 1, 4 * batch):
        yield (
            f"batched, {DEFAULT.num_inference_steps} steps (default)",
            batched(DEFAULT.num_inference_steps),
            size,
        )
    yield f"batched, {PROTOTYPE} steps", batched(PROTOTYPE), batch
    model.unet.to(memory_format=torch.channels_last)
    model.encoders.vae.to(memory_format=torch.channels_last)
    yield (
        f"batched, {DEFAULT.num_inference_steps} steps, channels last",
        batched(DEFAULT.num_inference_steps),
        batch,
    )


def measure_grid(bench: SamplerBench) -> None:
    """The loop, then steps and guidance of the batched sampler."""
    count = bench.held_out or (96 if bench.quick else 500)
    few = bench.one_by_one or (24 if bench.quick else 500)
    session.start(logical_cpus=4)
    with tempfile.TemporaryDirectory() as at:
        root = bench.data or f"{at}/world"
        if not bench.data:
            make_world(MakeWorld(output=root, preset="standard", train=16, val=count))
        if bench.generator:
            model = Generator.load(bench.generator, hardware.device())
        else:
            model = Generator.base(
                base_models.DIFFUSION, base_models.CLIP, Conditioning(panorama_width=256)
            )
        pairs = read_held_out(root, count, model.eval())
    some = {name: values[:few] for name, values in pairs.items()}
    name = f"one picture at a time, {PROTOTYPE} DDIM steps, guidance {DEFAULT.guidance_scale:g}"
    row, slow = measure(name, build_ddim(model, DEFAULT.guidance_scale), some, 1)
    rows, figures = [row], {"loop.pictures_per_s": slow}
    samplers = [
        Sampling(num_inference_steps=s, guidance_scale=g, guidance_interval=i) for s, g, i in GRID
    ]
    for sampling in (DEFAULT, *(other for other in samplers if other != DEFAULT)):

        def draw(ground: Tensor, key: Tensor, how: Sampling = sampling) -> Tensor:
            return model.sample(ground, key, how)

        row, speed = measure(sampling.describe(), draw, pairs, bench.batch)
        rows.append(row)
        if sampling == DEFAULT:
            row["sampler"] += " (default)"
            figures |= {"default.pictures_per_s": speed, "default.ratio": speed / slow}
    notes = (
        f"One process, {torch.get_num_threads()} threads, fp32, batches of {bench.batch} (of 1 in "
        "the loop); DPM-Solver++ of second order, where there is guidance both conditions in one "
        "pass of the UNet. The loop's DDIM asks the UNet twice in every step. Both follow the "
        "BEV map's low frequencies. Contrast: deviation over a picture's pixels.",
        "" if bench.generator else "The generator is untrained: only the speeds mean something.",
    )
    write_results(bench, "Sampler", rows, figures, [note for note in notes if note])


if __name__ == "__main__":
    main(parse_flags(SamplerBench))
