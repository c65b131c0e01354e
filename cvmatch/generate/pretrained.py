"""The pretrained parts of the generator, in Stable Diffusion's on-disk layout or from the hub."""

import dataclasses
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cvmatch.generate.batches import Sizes
from cvmatch.nn import hub


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Pretrained networks that stay frozen."""

    clip: CLIPVisionModel
    processor: CLIPImageProcessor
    vae: AutoencoderKL


def load_encoders(diffusion: str, clip: str, revision: str = "main", folder: str = "") -> Encoders:
    """Read the frozen parts from hub ids or local directories; `folder` is CLIP's subfolder.

    Raises:
        ValueError: a part is not there and the hub cannot be reached; says what to download, and
            which flag takes its directory.
    """
    clip_folder: dict[str, Any] = {"subfolder": folder} if folder else {}
    with hub.from_pretrained_kwargs(diffusion, "--diffusion") as safe:
        vae = AutoencoderKL.from_pretrained(diffusion, subfolder="vae", revision=revision, **safe)
    with hub.from_pretrained_kwargs(clip, "--clip") as safe:
        vision = CLIPVisionModel.from_pretrained(
            clip,
            dtype=torch.float32,  # transformers keeps a file's halves
            **clip_folder,
            **safe,
        )
        processor = CLIPImageProcessor.from_pretrained(clip, **clip_folder)
    return Encoders(vision, processor, vae)


def load_unet(diffusion: str, revision: str = "main") -> tuple[UNet2DConditionModel, DDPMScheduler]:
    """Read the denoiser and the noise schedule that it was trained with.

    Raises:
        ValueError: as `load_encoders`, or the schedule is of another kind of model.
    """
    with hub.from_pretrained_kwargs(diffusion, "--diffusion") as safe:
        noise: Any = DDPMScheduler.load_config(diffusion, subfolder="scheduler", revision=revision)
        scheduler: Any = DDPMScheduler.from_config(noise)
        unet = UNet2DConditionModel.from_pretrained(
            diffusion, subfolder="unet", revision=revision, **safe
        )
    _check(scheduler)
    return unet, scheduler


def sizes(diffusion: str, clip: str, panorama_width: int, revision: str = "main") -> Sizes:
    """Sizes of the pictures, from the config files alone: a driver holds no weights.

    Raises:
        ValueError: as `load_encoders`.
    """
    with hub.from_pretrained_kwargs(diffusion, "--diffusion"):
        unet: Any = UNet2DConditionModel.load_config(diffusion, subfolder="unet", revision=revision)
        vae: Any = AutoencoderKL.load_config(diffusion, subfolder="vae", revision=revision)
    with hub.from_pretrained_kwargs(clip, "--clip"):
        vision: Any = CLIPVisionConfig.from_pretrained(clip)
    latent = unet["sample_size"]
    return Sizes((vision.image_size, panorama_width), latent * _factor(vae), latent)


def tile_size(unet: UNet2DConditionModel, vae: AutoencoderKL) -> int:
    """Side of the aerial picture in pixels: the UNet's latent size times the VAE's factor."""
    return unet.config["sample_size"] * _factor(vae.config)


def _factor(vae_config: Any) -> int:
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def _check(scheduler: DDPMScheduler) -> None:
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"scheduler/scheduler_config.json: prediction_type is {kind!r}, expected 'epsilon' or "
            "'v_prediction'. Choose another --diffusion."
        )
