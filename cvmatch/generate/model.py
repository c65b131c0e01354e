"""The generator: street panorama G -> synthetic aerial A, by a latent diffusion model.

Frozen CLIP tokens and a map of the panorama's rays condition Stable Diffusion's UNet. Training and
sampling share one conditioning function, `Generator.condition`.
"""

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

from cvmatch import draws, geometry
from cvmatch.generate.condition import Condition, Conditioner, Conditioning
from cvmatch.generate.noise import Noise
from cvmatch.generate.parts import CLIP, DIFFUSION, Parts, load_parts, tile_size

_FORMAT = 2  # 1 knew no gain: its UNets were trained with 1
_CONFIG, _WEIGHTS = "conditioner.json", "conditioner.safetensors"


class Generator(nn.Module):
    """Trained: `unet` and `conditioner`. Frozen, always in evaluation mode: `clip` and `vae`.

    Pictures are RGB in [0, 1]: panoramas `panorama_size` = (height, width), tiles `tile` pixels a
    side; latents are `latent` = (channels, size, size), scaled to about unit variance.
    """

    # Any: diffusers' annotations are unions over flags that are not used here.
    unet: Any
    vae: Any
    clip: Any
    mean: Tensor
    deviation: Tensor

    def __init__(self, parts: Parts, conditioning: Conditioning) -> None:
        super().__init__()
        self.unet, self.vae, self.clip = parts.unet, parts.vae, parts.clip
        self.noise, self.processor = Noise(parts.scheduler), parts.processor
        self.conditioning = conditioning
        vision: Any = parts.clip.config
        self.conditioner = Conditioner(
            conditioning,
            states=vision.hidden_size,
            width=parts.unet.config["cross_attention_dim"],
            height=vision.image_size,
            patch=vision.patch_size,
        )
        channels, size = parts.vae.config["latent_channels"], parts.unet.config["sample_size"]
        self.latent = (channels, size, size)
        self.tile = tile_size(parts.unet, parts.vae)
        self.panorama_size = (vision.image_size, conditioning.panorama_width)
        widen(self.unet, channels + (conditioning.channels if conditioning.geometry else 0))
        for name, values in zip(
            ("mean", "deviation"),
            (self.processor.image_mean, self.processor.image_std),
            strict=True,
        ):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.clip.requires_grad_(False).eval()
        self.vae.requires_grad_(False).eval()

    @classmethod
    def base(
        cls,
        diffusion: str = DIFFUSION,
        clip: str = CLIP,
        conditioning: Conditioning | None = None,
        revision: str = "main",
    ) -> "Generator":
        """Untrained: the base UNet unchanged behind a new conditioner.

        `diffusion` and `clip` are hub ids or local directories (safetensors); `revision` is of
        `diffusion`.

        Raises:
            ValueError: a base model cannot be found; says what to download and which flag takes it.
        """
        return cls(load_parts(diffusion, clip, revision), conditioning or Conditioning())

    @classmethod
    def load(cls, directory: str, device: torch.device | str = "cpu") -> "Generator":
        """A trained generator from the local directory that `save` wrote, in evaluation mode.

        Raises:
            ValueError: not such a directory.
        """
        record = require(directory)
        parts = load_parts(directory, directory, folder="clip")
        model = cls(parts, Conditioning(**record["conditioning"]))
        model.conditioner.load_state_dict(load_file(os.path.join(directory, _WEIGHTS)))
        return model.to(device).eval()

    def save(self, directory: str) -> None:
        """Write `unet/ vae/ scheduler/` as Stable Diffusion has them, `clip/`, the conditioner."""
        parts = {"unet": self.unet, "vae": self.vae, "clip": self.clip}
        for name, part in {**parts, "scheduler": self.noise.scheduler}.items():
            part.save_pretrained(os.path.join(directory, name))
        self.processor.save_pretrained(os.path.join(directory, "clip"))
        state = {name: value.contiguous() for name, value in self.conditioner.state_dict().items()}
        save_file(state, os.path.join(directory, _WEIGHTS))
        record = {"format": _FORMAT, "conditioning": dataclasses.asdict(self.conditioning)}
        with open(os.path.join(directory, _CONFIG), "w") as file:
            json.dump(record, file, indent=2, sort_keys=True)

    def train(self, mode: bool = True) -> "Generator":
        """Switch the trained parts; the frozen ones stay in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        self.vae.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @torch.no_grad()
    def states(
        self, panorama: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch token state"]:
        """Frozen CLIP's states of the azimuth crops: all tokens, or their pooled mean (one).

        A panorama has the same states in every epoch, so a training set may store them.
        """
        crops = geometry.azimuth_crops(panorama, self.conditioning.crops)
        seen = self.clip(self._normalised(crops.flatten(0, 1)))
        if self.conditioning.mode == "pooled":
            return seen.pooler_output.unflatten(0, crops.shape[:2]).mean(dim=1, keepdim=True)
        return seen.last_hidden_state.unflatten(0, crops.shape[:2]).flatten(1, 2)

    def condition(
        self,
        panorama: Float[Tensor, "batch 3 height width"],
        states: Float[Tensor, "batch token state"] | None = None,
    ) -> Condition:
        """What the UNet is told of panoramas: the one function behind training and sampling.

        `states` are stored results of `states(panorama)`.

        Raises:
            ValueError: the panoramas have another size than the model was built for.
        """
        if panorama.shape[-2:] != self.panorama_size:
            raise ValueError(
                f"generator: expected panoramas of {self.panorama_size} (height, width) pixels, "
                f"got {tuple(panorama.shape[-2:])}. Decode them to that size, or train with "
                "--conditioning.panorama-width."
            )
        states = self.states(panorama) if states is None else states
        return self.conditioner(states, panorama, self.latent[1])

    def predict(
        self,
        noisy: Float[Tensor, "batch c h w"],
        step: Int64[Tensor, " batch"],
        condition: Condition,
    ) -> Float[Tensor, "batch c h w"]:
        """The UNet's answer: noise or velocity, as its scheduler says (`Noise.target`)."""
        if condition.map is not None:
            noisy = torch.cat(
                [noisy, self.conditioning.gain * condition.map.to(noisy.dtype)], dim=1
            )
        return self.unet(noisy, step, encoder_hidden_states=condition.tokens).sample

    @torch.no_grad()
    def encode(self, tile: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch c h w"]:
        """Latents of tiles: the VAE's posterior mean, so that one encoding serves all epochs."""
        posterior = self.vae.encode(tile * 2 - 1).latent_dist
        return posterior.mode() * self.vae.config["scaling_factor"]

    def decode(self, latent: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures of latents, in [0, 1] up to the VAE's error (not clamped: gradient flows)."""
        return self.vae.decode(latent / self.vae.config["scaling_factor"]).sample / 2 + 0.5

    def embed(self, picture: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch state"]:
        """CLIP's pooled vector of square pictures; gradient flows into them."""
        size = self.clip.config.image_size
        if picture.shape[-1] != size:
            picture = F.interpolate(picture, (size, size), mode="bilinear", antialias=True)
        return self.clip(self._normalised(picture)).pooler_output

    @torch.no_grad()
    def sample(
        self,
        panorama: Float[Tensor, "batch 3 height width"],
        keys: Int64[Tensor, " batch"],
        *,
        steps: int = 12,
        guidance: float = 2.0,
        seed: int = 0,
    ) -> Float[Tensor, "batch 3 size size"]:
        """Synthetic aerials in [0, 1], by DPM-Solver++ with classifier-free guidance.

        The noise of a row depends on its key (`draws.key(pair_id)`) and `seed` alone, so a picture
        does not depend on its batch. `guidance` 1 is the plain conditional model, in half the time.
        """
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            condition = self.condition(panorama)
            both = _doubled(self.conditioner, condition) if guidance != 1 else condition
            latent = draws.normal(keys, draws.stream(seed, purpose="sample"), *self.latent)
            solver: Any = self.noise.solver(steps)
            for step in solver.timesteps:
                given = torch.cat([latent, latent]) if guidance != 1 else latent
                at = torch.full((len(given),), int(step), dtype=torch.int64, device=self.device)
                answer = self.predict(given, at, both).float()
                if guidance != 1:
                    right, null = answer.chunk(2)
                    answer = null + guidance * (right - null)
                latent = solver.step(answer, step, latent).prev_sample
            return self.decode(latent).float().clamp(0, 1)

    def _normalised(self, picture: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        return (picture - self.mean) / self.deviation


def require(directory: str) -> dict[str, Any]:
    """The record of a directory that `Generator.save` wrote.

    Raises:
        ValueError: it is none, or of another format; says what to do.
    """
    path = os.path.join(directory, _CONFIG)
    if not os.path.isfile(path):
        raise ValueError(
            f"generator {directory!r}: has no {_CONFIG}. Expected a local directory that "
            "jobs/train_generator.py published; base models go to its --diffusion and --clip."
        )
    with open(path) as file:
        record = json.load(file)
    if record["format"] != _FORMAT:
        raise ValueError(
            f"{path}: format {record['format']}, this version reads {_FORMAT}. Train it again, "
            "or use the cvmatch that wrote it."
        )
    return record


def widen(unet: UNet2DConditionModel, inputs: int) -> None:
    """Give the UNet `inputs` input channels; new ones have zero weights, so it starts unchanged.

    Raises:
        ValueError: the UNet already has more, or other, channels than that.
    """
    old: Any = unet.conv_in
    if old.in_channels == inputs:
        return
    if old.in_channels > inputs:
        raise ValueError(
            f"generator: the UNet has {old.in_channels} input channels, expected at most {inputs}. "
            "Was it saved by a training with --conditioning.mode tokens+geometry?"
        )
    new = nn.Conv2d(inputs, old.out_channels, old.kernel_size, padding=old.padding)
    new = new.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()[:, : old.in_channels] = old.weight
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=inputs)


def _doubled(conditioner: Conditioner, condition: Condition) -> Condition:
    """The condition, then the null, in one batch."""
    rows = len(condition.tokens)
    null = conditioner.dropped(
        condition, torch.zeros(rows, dtype=torch.bool, device=condition.tokens.device)
    )
    if condition.map is None or null.map is None:
        return Condition(torch.cat([condition.tokens, null.tokens]), None)
    return Condition(
        torch.cat([condition.tokens, null.tokens]), torch.cat([condition.map, null.map])
    )
