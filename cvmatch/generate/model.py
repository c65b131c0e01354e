"""The generator: street panorama G -> synthetic aerial A, by a latent diffusion model.

Frozen CLIP tokens and a bird's-eye-view map of the panorama condition Stable Diffusion's UNet.
Training and sampling share one conditioning function, `Generator.condition`.
"""

import copy
import dataclasses
import json
import os
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.data import storage
from cvmatch.generate import diffusion as process
from cvmatch.generate.conditioning import Condition, Conditioner, PanoramaFeatures
from cvmatch.generate.diffusion import NoiseSchedule
from cvmatch.generate.encoders import FrozenEncoders, load_unet, vae_factor
from cvmatch.generate.settings import (
    CLIP,
    DEFAULT_SAMPLING,
    DIFFUSION,
    Conditioning,
    Sampling,
    TrainedWeights,
)
from cvmatch.nn import rng

FORMAT = 6
"""Version of the directory that `Generator.save` writes."""

_CONFIG, _WEIGHTS = "conditioner.json", "conditioner.safetensors"


class Generator(nn.Module):
    """Trained: `unet` and `conditioner`. Frozen: `encoders`, CLIP and the VAE.

    Images are RGB in [0, 1]: panoramas `panorama_size` = (height, width), tiles `tile_size` pixels
    a side; latents are `latent_shape` = (channels, size, size), scaled to about unit variance.
    """

    # Any: diffusers' annotations are unions over flags that are not used here.
    unet: Any

    def __init__(
        self,
        encoders: FrozenEncoders,
        unet: UNet2DConditionModel,
        schedule: NoiseSchedule,
        conditioning: Conditioning,
    ) -> None:
        super().__init__()
        self.encoders, self.unet, self.schedule = encoders, unet, schedule
        self.conditioning = conditioning
        vision: Any = encoders.clip.config
        self.conditioner = Conditioner(
            states=vision.hidden_size,
            width=unet.config["cross_attention_dim"],
            bev_channels=conditioning.bev_channels,
            panorama=encoders.panorama_size,
            patch=vision.patch_size,
        )
        channels, size = encoders.vae.config["latent_channels"], unet.config["sample_size"]
        self.latent_shape = (channels, size, size)
        self.tile_size = size * vae_factor(encoders.vae.config)
        self.panorama_size = encoders.panorama_size
        expand_conv_in(unet, channels + conditioning.bev_channels)

    @classmethod
    def base(
        cls,
        diffusion: str = DIFFUSION,
        clip: str = CLIP,
        conditioning: Conditioning | None = None,
    ) -> "Generator":
        """Build an untrained generator: the base UNet unchanged behind a new conditioner.

        Args:
            diffusion: hub id or local directory (safetensors) in Stable Diffusion's layout.
            clip: hub id or local directory of a CLIP vision tower.
            conditioning: what the UNet sees of the panorama.

        Raises:
            ValueError: a base model cannot be found; says what to download and which flag takes it.
        """
        conditioning = conditioning or Conditioning()
        encoders = FrozenEncoders.load(diffusion, clip, conditioning.panorama_width)
        unet, scheduler = load_unet(diffusion)
        return cls(encoders, unet, NoiseSchedule(scheduler), conditioning)

    @classmethod
    def load(cls, directory: str, device: torch.device | str = "cpu") -> "Generator":
        """Load a trained generator from a directory or URI that `save` wrote, in evaluation mode.

        Raises:
            ValueError: not such a directory.
        """
        directory = storage.local_directory(directory)
        conditioning = Conditioning(**read_config(directory)["conditioning"])
        model = cls.base(directory, os.path.join(directory, "clip"), conditioning)
        model.conditioner.load_state_dict(load_file(os.path.join(directory, _WEIGHTS)))
        return model.to(device).eval()

    def save(self, directory: str) -> None:
        """Write `unet/ vae/ scheduler/` as Stable Diffusion has them, `clip/`, the conditioner."""
        encoders = self.encoders
        parts = {"unet": self.unet, "vae": encoders.vae, "clip": encoders.clip}
        for name, part in {**parts, "scheduler": self.schedule.scheduler}.items():
            part.save_pretrained(os.path.join(directory, name))
        encoders.processor.save_pretrained(os.path.join(directory, "clip"))
        state = {name: value.contiguous() for name, value in self.conditioner.state_dict().items()}
        save_file(state, os.path.join(directory, _WEIGHTS))
        config = {"format": FORMAT, "conditioning": dataclasses.asdict(self.conditioning)}
        with open(os.path.join(directory, _CONFIG), "w") as file:
            json.dump(config, file, indent=2, sort_keys=True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoders.mean.device

    def condition(self, features: PanoramaFeatures) -> Condition:
        """Build the UNet's condition from panorama features. Training and sampling both call it."""
        return self.conditioner(features, self.latent_shape[1])

    def predict(
        self,
        noisy: Float[Tensor, "batch c h w"],
        timestep: Int64[Tensor, " batch"],
        condition: Condition,
    ) -> Float[Tensor, "batch c h w"]:
        """Return the UNet's prediction: noise or velocity (`NoiseSchedule.target`)."""
        bev = self.conditioning.bev_gain * condition.bev.to(noisy.dtype)
        inputs = torch.cat([noisy, bev], dim=1)
        return self.unet(inputs, timestep, encoder_hidden_states=condition.tokens).sample

    @torch.no_grad()
    def sample(
        self,
        panorama: Float[Tensor, "batch 3 height width"],
        keys: Int64[Tensor, " batch"],
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Float[Tensor, "batch 3 size size"]:
        """Sample synthetic aerials, in [0, 1], of panoramas.

        Args:
            panorama: RGB in [0, 1].
            keys: `rng.row_key(pair_id)`. A row's noise depends on its key and the seed alone, so
                an image does not depend on its batch.
            sampling: steps, guidance and seed.
        """
        with self._autocast():
            return self.sample_images(self.encoders.encode_panorama(panorama), keys, sampling)

    @torch.no_grad()
    def sample_images(
        self,
        features: PanoramaFeatures,
        keys: Int64[Tensor, " batch"],
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Float[Tensor, "batch 3 size size"]:
        """Sample synthetic aerials, in [0, 1], from panorama features."""
        with self._autocast():
            latents = self.sample_latents(features, keys, sampling)
            return self.encoders.decode(latents).float().clamp(0, 1)

    @torch.no_grad()
    def sample_latents(
        self,
        features: PanoramaFeatures,
        keys: Int64[Tensor, " batch"],
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Float[Tensor, "batch c h w"]:
        """Sample latents by DPM-Solver++ with classifier-free and low-frequency guidance."""
        with self._autocast():
            condition = self.condition(features)
            unguided = sampling.guidance_scale == 1
            both = condition if unguided else self.conditioner.add_null(condition)
            stream = rng.fold_in(sampling.seed, purpose="sample")
            latent = rng.normal(keys, stream, *self.latent_shape)
            target = self.low_freq_target(condition)
            solver: Any = self.schedule.solver(sampling.num_inference_steps)
            mode = None
            for index, timestep in enumerate(solver.timesteps):
                noise_level = int(timestep) / len(self.schedule)
                scale = sampling.scale_at(noise_level)
                guided = target is not None and process.guides_low_freq(noise_level)
                before, mode = mode, (scale, guided)
                if mode != before:  # a second-order slope between two models means nothing
                    solver = self.schedule.solver(sampling.num_inference_steps, begin=index)
                model_pred = self._cfg_prediction(
                    latent, torch.full_like(keys, int(timestep)), condition, both, scale
                )
                model_pred = process.guide_low_freq(
                    self.schedule, latent, model_pred, int(timestep), target
                )
                latent = solver.step(model_pred, timestep, latent).prev_sample
            return latent

    def low_freq_target(self, condition: Condition) -> Float[Tensor, "batch c cell cell"] | None:
        """Encode the BEV map's colours to coarse latents; None where the UNet draws all."""
        cells = self.conditioning.low_freq_cells
        if not cells:
            return None
        rgb = self.conditioner.bev.predict_rgb(condition.bev)
        image = F.interpolate(rgb, (self.tile_size, self.tile_size), mode="bicubic").clamp(0, 1)
        return process.downsample(self.encoders.encode_tile(image).float(), cells)

    def _cfg_prediction(
        self, latent: Tensor, timestep: Tensor, condition: Condition, both: Condition, scale: float
    ) -> Tensor:
        """Predict with classifier-free guidance; `both` has the null behind the condition."""
        if scale == 1:
            return self.predict(latent, timestep, condition).float()
        pred = self.predict(latent.repeat(2, 1, 1, 1), timestep.repeat(2), both).float()
        cond, uncond = pred.chunk(2)
        return uncond + scale * (cond - uncond)

    def _autocast(self) -> torch.autocast:
        """Compute in bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")


def read_config(directory: str) -> dict[str, Any]:
    """Read what `Generator.save` wrote beside the weights.

    Raises:
        ValueError: the directory is none, or of another format; says what to do.
    """
    path = os.path.join(storage.local_directory(directory), _CONFIG)
    if not os.path.isfile(path):
        raise ValueError(
            f"generator {storage.describe_local(directory)}: has no {_CONFIG}. Expected a "
            "directory that cvmatch train-generator published (base models go to its --diffusion "
            "and --clip). Of a cluster, each node has to see it: pass one that all mount, or a URI "
            "(s3://...)."
        )
    with open(path) as file:
        config = json.load(file)
    if config["format"] != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {config['format']}. Train it again, or use the "
            "cvmatch that wrote it."
        )
    return config


def expand_conv_in(unet: UNet2DConditionModel, inputs: int) -> None:
    """Expand the UNet to `inputs` input channels; new ones have zero weights, so it is unchanged.

    Raises:
        ValueError: the UNet already has more channels than that.
    """
    old: Any = unet.conv_in
    if old.in_channels == inputs:
        return
    if old.in_channels > inputs:
        raise ValueError(
            f"generator: expected a UNet of at most {inputs} input channels, got "
            f"{old.in_channels}. Was it saved by a training with more --conditioning.bev-channels?"
        )
    new = nn.Conv2d(inputs, old.out_channels, old.kernel_size, padding=old.padding)
    new = new.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()[:, : old.in_channels] = old.weight
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=inputs)


def set_trainable(unet: Any, weights: TrainedWeights, lora_rank: int) -> None:
    """Freeze the UNet's weights that are not trained; `lora` adds adapters."""
    if weights == "lora":
        # Not at the top: importing it takes 2 s in every process that trains or encodes.
        from peft import LoraConfig  # noqa: PLC0415

        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=layers))
    if weights != "all":
        for name, weight in unet.named_parameters():
            chosen = ".attn2." in name if weights == "attention" else "lora_" in name
            weight.requires_grad_(chosen or name.startswith("conv_in."))


def merge_lora(generator: Generator) -> Generator:
    """Return the generator with its adapters, if any, merged into a copy of the UNet."""
    unet: Any = generator.unet
    if not getattr(unet, "peft_config", None):
        return generator
    unet = copy.deepcopy(unet)
    unet.fuse_lora()
    unet.unload_lora()
    merged = Generator(generator.encoders, unet, generator.schedule, generator.conditioning)
    merged.conditioner = generator.conditioner
    return merged
