"""The pretrained parts of the generator, in Stable Diffusion's on-disk layout or from the hub."""

import dataclasses
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cvmatch import hub
from cvmatch.generate.pairs import Sizes

DIFFUSION = "CompVis/stable-diffusion-v1-4"
CLIP = "openai/clip-vit-base-patch32"


@dataclasses.dataclass
class Parts:
    """Pretrained networks, and the configs that say how they were trained."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler
    clip: CLIPVisionModel
    processor: CLIPImageProcessor


def load_parts(diffusion: str, clip: str, revision: str = "main", folder: str = "") -> Parts:
    """Read the parts from hub ids or local directories; `folder` is CLIP's subfolder, if any.

    Raises:
        ValueError: a part is not there and the hub cannot be reached; says what to download, and
            which flag takes its directory.
    """
    clip_folder: dict[str, Any] = {"subfolder": folder} if folder else {}
    with hub.located(diffusion, "--diffusion") as safe:
        at: dict[str, Any] = {"revision": revision}
        noise: Any = DDPMScheduler.load_config(diffusion, subfolder="scheduler", **at)
        scheduler: Any = DDPMScheduler.from_config(noise)
        unet = UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet", **at, **safe)
        vae = AutoencoderKL.from_pretrained(diffusion, subfolder="vae", **at, **safe)
    with hub.located(clip, "--clip") as safe:
        vision = CLIPVisionModel.from_pretrained(
            clip,
            dtype=torch.float32,  # transformers keeps a file's halves
            **clip_folder,
            **safe,
        )
        processor = CLIPImageProcessor.from_pretrained(clip, **clip_folder)
    _check(scheduler)
    return Parts(unet, vae, scheduler, vision, processor)


def sizes(diffusion: str, clip: str, panorama_width: int, revision: str = "main") -> Sizes:
    """Sizes of the pictures, from the config files alone: a driver holds no weights.

    Raises:
        ValueError: as `load_parts`.
    """
    with hub.located(diffusion, "--diffusion"):
        unet: Any = UNet2DConditionModel.load_config(diffusion, subfolder="unet", revision=revision)
        vae: Any = AutoencoderKL.load_config(diffusion, subfolder="vae", revision=revision)
    with hub.located(clip, "--clip"):
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
