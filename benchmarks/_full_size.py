"""Base models of the published sizes, with random weights, which serve for speed; and the peak."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)


def write_diffusion(directory: str) -> None:
    """Stable Diffusion v1-4 for tiles of 256 pixels, and CLIP ViT-B/32 as `clip/`, on disk."""
    if os.path.isdir(directory):
        return
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
    clip = CLIPVisionModel(CLIPVisionConfig(patch_size=32))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": scheduler, "clip": clip}
    partial = f"{directory}.partial"
    for name, part in parts.items():
        part.save_pretrained(f"{partial}/{name}")
    CLIPImageProcessor().save_pretrained(f"{partial}/clip")
    os.rename(partial, directory)


def write_segformer(directory: str) -> None:
    """SegFormer B3 on disk."""
    config = SegformerConfig(
        depths=[3, 4, 18, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768
    )
    SegformerForSemanticSegmentation(config).save_pretrained(directory)


def peak_flops(device: torch.device) -> float:
    """FLOP/s of a large matrix product, the median of ten: bf16 on a GPU, else fp32."""
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = [time_call(lambda: torch.mm(left, right), device) for _ in range(13)]
    return 2 * size**3 / statistics.median(times[3:])


def count_flops(call: Callable[[], Any]) -> float:
    """FLOP of the convolutions, matrix products and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, with all that it left to the device."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
