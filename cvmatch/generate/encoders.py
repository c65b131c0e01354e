"""The base models: CLIP and the VAE, which stay frozen, and the UNet with its noise schedule.

They are read from Stable Diffusion's layout on disk, or from the hub.
"""

import os
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cvmatch.generate import conditioning
from cvmatch.generate.batches import ImageSizes
from cvmatch.generate.conditioning import PanoramaFeatures
from cvmatch.nn import geometry, hub

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of attention in old files of diffusers, which it renames when it loads them."""


class FrozenEncoders(nn.Module):
    """CLIP for panoramas and the VAE for tiles, always in evaluation mode.

    Images are RGB in [0, 1]: panoramas of `panorama_size` = (height, width) pixels.
    """

    # Any: diffusers' annotations are unions over flags that are not used here.
    clip: Any
    vae: Any
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        clip: CLIPVisionModel,
        processor: CLIPImageProcessor,
        vae: AutoencoderKL,
        panorama_width: int,
    ) -> None:
        super().__init__()
        self.clip, self.vae, self.processor = clip, vae, processor
        vision: Any = clip.config
        self.panorama_size = (vision.image_size, panorama_width)
        for name, values in zip(
            ("mean", "deviation"), (processor.image_mean, processor.image_std), strict=True
        ):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, diffusion: str, clip: str, panorama_width: int) -> "FrozenEncoders":
        """Read CLIP and the VAE of `diffusion` from hub ids or local directories.

        Raises:
            ValueError: one is not there and the hub cannot be reached, or its weights do not fit;
                says what to download, and which flag takes its directory.
        """
        name, revision = split_revision(diffusion)
        vae = hub.load(AutoencoderKL, name, "--diffusion", subfolder="vae", revision=revision)
        # transformers would keep a file's halves.
        vision = hub.load(CLIPVisionModel, clip, "--clip", dtype=torch.float32)
        with hub.from_pretrained_kwargs(clip, "--clip"):
            processor = CLIPImageProcessor.from_pretrained(clip)
        return cls(vision, processor, vae, panorama_width)

    def train(self, mode: bool = True) -> "FrozenEncoders":
        """Stay in evaluation mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def encode_panorama(self, panorama: Float[Tensor, "batch 3 height width"]) -> PanoramaFeatures:
        """Return CLIP's tokens of all azimuth crops, and the view of the BEV network.

        Raises:
            ValueError: the panoramas have another size than the model was built for.
        """
        if panorama.shape[-2:] != self.panorama_size:
            raise ValueError(
                f"generator: expected panoramas of {self.panorama_size} (height, width) pixels, "
                f"got {tuple(panorama.shape[-2:])}. Decode them to that size, or train with "
                "--conditioning.panorama-width."
            )
        crops = geometry.crop_azimuths(panorama, conditioning.count_crops(*self.panorama_size))
        states = self.clip(self._normalise(crops.flatten(0, 1))).last_hidden_state
        tokens = states.unflatten(0, crops.shape[:2]).flatten(1, 2)
        return PanoramaFeatures(tokens, conditioning.resize_panorama(panorama))

    @torch.no_grad()
    def encode_tile(
        self, tile: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch c h w"]:
        """Return the VAE's posterior means, scaled to about unit variance."""
        posterior = self.vae.encode(tile * 2 - 1).latent_dist
        return posterior.mode() * self.vae.config["scaling_factor"]

    def decode(self, latent: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Decode latents to images in [0, 1], up to the VAE's error (not clamped: has gradient)."""
        return self.vae.decode(latent / self.vae.config["scaling_factor"]).sample / 2 + 0.5

    def embed_image(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch state"]:
        """Return CLIP's pooled vectors of square images; gradient flows into the images."""
        size = self.panorama_size[0]
        if image.shape[-1] != size:
            image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
        return self.clip(self._normalise(image)).pooler_output

    def _normalise(self, image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        return (image - self.mean) / self.deviation


def load_unet(diffusion: str) -> tuple[UNet2DConditionModel, DDPMScheduler]:
    """Read the denoiser and the noise schedule that it was trained with.

    Raises:
        ValueError: as `FrozenEncoders.load`, or the schedule's prediction type is not supported.
    """
    name, revision = split_revision(diffusion)
    with hub.from_pretrained_kwargs(name, "--diffusion"):
        config: Any = DDPMScheduler.load_config(name, subfolder="scheduler", revision=revision)
        scheduler: Any = DDPMScheduler.from_config(config)
    unet = hub.load(UNet2DConditionModel, name, "--diffusion", subfolder="unet", revision=revision)
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"scheduler/scheduler_config.json: expected prediction_type 'epsilon' or "
            f"'v_prediction', got {kind!r}. Choose another --diffusion."
        )
    return unet, scheduler


def check_base_models(diffusion: str, clip: str) -> None:
    """Check that base models can be had; of local ones also that their weights' names fit.

    No weights are loaded.

    Raises:
        ValueError: as `FrozenEncoders.load`; names all that are not there.
    """
    name, revision = split_revision(diffusion)
    hub.check_all(
        lambda: hub.check_model(name, "--diffusion", "unet", "vae", revision=revision),
        lambda: hub.check_model(clip, "--clip"),
    )
    for folder, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        _check_names(os.path.join(name, folder), kind)
    if os.path.isdir(clip):
        hub.load(CLIPVisionModel, clip, "--clip", device_map="meta")


def _check_names(directory: str, kind: Any) -> None:
    """Check the names in a local part of a diffusion model; diffusers itself loads all to know."""
    path = os.path.join(directory, "diffusion_pytorch_model.safetensors")
    if not os.path.isfile(path):
        return
    with torch.device("meta"):
        expected = set(kind.from_config(kind.load_config(directory)).state_dict())
    with safe_open(path, framework="pt") as file:
        found = {_current_name(name) for name in file.keys()}  # noqa: SIM118
    hub.check_fit(directory, "--diffusion", expected - found, found - expected)


def _current_name(name: str) -> str:
    """Return today's name of a weight: the VAE of Stable Diffusion 1 was saved with older ones."""
    return ".".join(_OLD_NAMES.get(part, part) for part in name.split("."))


def read_sizes(diffusion: str, clip: str, panorama_width: int) -> ImageSizes:
    """Return the image sizes of base models from their config files: a driver holds no weights.

    Raises:
        ValueError: as `FrozenEncoders.load`.
    """
    name, revision = split_revision(diffusion)
    with hub.from_pretrained_kwargs(name, "--diffusion"):
        unet: Any = UNet2DConditionModel.load_config(name, subfolder="unet", revision=revision)
        vae: Any = AutoencoderKL.load_config(name, subfolder="vae", revision=revision)
    with hub.from_pretrained_kwargs(clip, "--clip"):
        vision: Any = CLIPVisionConfig.from_pretrained(clip)
    latent = unet["sample_size"]
    return ImageSizes((vision.image_size, panorama_width), latent * vae_factor(vae), latent)


def split_revision(name: str) -> tuple[str, str]:
    """Split `id@revision`; a local directory and an id alone have the revision `main`."""
    if os.path.isdir(name):
        return name, "main"
    name, _, revision = name.partition("@")
    return name, revision or "main"


def vae_factor(config: Any) -> int:
    """Return how many pixels of the image are a cell of the latent, along a side."""
    return 2 ** (len(config["block_out_channels"]) - 1)
