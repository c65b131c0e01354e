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

from cvmatch.generate import low_freq_guidance
from cvmatch.generate.conditioning import Condition, Conditioner, Seen
from cvmatch.generate.diffusion import Noise
from cvmatch.generate.encoders import Frozen
from cvmatch.generate.pretrained import load_encoders, load_unet, tile_size
from cvmatch.generate.settings import CLIP, DEFAULT, DIFFUSION, Conditioning, Prediction, Sampling
from cvmatch.nn import rng

_FORMAT = 5  # the rays of 4 knew no mean colour
_CONFIG, _WEIGHTS = "conditioner.json", "conditioner.safetensors"


class Generator(nn.Module):
    """Trained: `unet` and `conditioner`. Frozen: `frozen`, CLIP and the VAE.

    Pictures are RGB in [0, 1]: panoramas `panorama_size` = (height, width), tiles `tile` pixels a
    side; latents are `latent` = (channels, size, size), scaled to about unit variance.
    """

    # Any: diffusers' annotations are unions over flags that are not used here.
    unet: Any

    def __init__(self, frozen: Frozen, unet: UNet2DConditionModel, noise: Noise) -> None:
        super().__init__()
        self.frozen, self.unet, self.noise = frozen, unet, noise
        self.conditioning = conditioning = frozen.conditioning
        vision: Any = frozen.clip.config
        self.conditioner = Conditioner(
            conditioning,
            states=vision.hidden_size,
            width=unet.config["cross_attention_dim"],
            height=vision.image_size,
            patch=vision.patch_size,
        )
        channels, size = frozen.vae.config["latent_channels"], unet.config["sample_size"]
        self.latent = (channels, size, size)
        self.tile = tile_size(unet, frozen.vae)
        self.panorama_size = frozen.panorama_size
        widen(unet, channels + (conditioning.channels if conditioning.geometry else 0))

    @classmethod
    def base(
        cls,
        diffusion: str = DIFFUSION,
        clip: str = CLIP,
        conditioning: Conditioning | None = None,
        revision: str = "main",
        prediction: Prediction = "base",
    ) -> "Generator":
        """Untrained: the base UNet unchanged behind a new conditioner.

        `diffusion` and `clip` are hub ids or local directories (safetensors); `revision` is of
        `diffusion`; `prediction` is what the UNet shall learn to answer, in place of the base's.

        Raises:
            ValueError: a base model cannot be found; says what to download and which flag takes it.
        """
        frozen = Frozen(load_encoders(diffusion, clip, revision), conditioning or Conditioning())
        unet, scheduler = load_unet(diffusion, revision)
        if prediction != "base":
            scheduler.register_to_config(prediction_type=prediction)
        return cls(frozen, unet, Noise(scheduler))

    @classmethod
    def load(cls, directory: str, device: torch.device | str = "cpu") -> "Generator":
        """A trained generator from the local directory that `save` wrote, in evaluation mode.

        Raises:
            ValueError: not such a directory.
        """
        conditioning = Conditioning(**require(directory)["conditioning"])
        frozen = Frozen(load_encoders(directory, directory, folder="clip"), conditioning)
        unet, scheduler = load_unet(directory)
        model = cls(frozen, unet, Noise(scheduler))
        model.conditioner.load_state_dict(load_file(os.path.join(directory, _WEIGHTS)))
        return model.to(device).eval()

    def save(self, directory: str) -> None:
        """Write `unet/ vae/ scheduler/` as Stable Diffusion has them, `clip/`, the conditioner."""
        frozen = self.frozen
        parts = {"unet": self.unet, "vae": frozen.vae, "clip": frozen.clip}
        for name, part in {**parts, "scheduler": self.noise.scheduler}.items():
            part.save_pretrained(os.path.join(directory, name))
        frozen.processor.save_pretrained(os.path.join(directory, "clip"))
        state = {name: value.contiguous() for name, value in self.conditioner.state_dict().items()}
        save_file(state, os.path.join(directory, _WEIGHTS))
        record = {"format": _FORMAT, "conditioning": dataclasses.asdict(self.conditioning)}
        with open(os.path.join(directory, _CONFIG), "w") as file:
            json.dump(record, file, indent=2, sort_keys=True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.frozen.mean.device

    def condition(self, seen: Seen) -> Condition:
        """What the UNet is told: the one function behind training and sampling, after `look`."""
        return self.conditioner(seen, self.latent[1])

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
    def sample(
        self,
        panorama: Float[Tensor, "batch 3 height width"],
        keys: Int64[Tensor, " batch"],
        sampling: Sampling = DEFAULT,
    ) -> Float[Tensor, "batch 3 size size"]:
        """`draw` of what CLIP and the rays see of the panoramas."""
        with self._halved():
            return self.draw(self.frozen.look(panorama), keys, sampling)

    @torch.no_grad()
    def draw(
        self, seen: Seen, keys: Int64[Tensor, " batch"], sampling: Sampling = DEFAULT
    ) -> Float[Tensor, "batch 3 size size"]:
        """Synthetic aerials in [0, 1]: the pictures of `latents`."""
        with self._halved():
            return self.frozen.decode(self.latents(seen, keys, sampling)).float().clamp(0, 1)

    @torch.no_grad()
    def latents(
        self, seen: Seen, keys: Int64[Tensor, " batch"], sampling: Sampling = DEFAULT
    ) -> Float[Tensor, "batch c h w"]:
        """Latents of synthetic aerials, by DPM-Solver++ with classifier-free guidance.

        The noise of a row depends on its key (`rng.row_key(pair_id)`) and the seed alone, so a
        picture does not depend on its batch.
        """
        with self._halved():
            condition = self.condition(seen)
            both = _doubled(self.conditioner, condition) if sampling.guidance != 1 else condition
            stream = rng.fold_in(sampling.seed, purpose="sample")
            latent = rng.normal(keys, stream, *self.latent)
            wanted, before = self.wanted(condition), None
            solver: Any = self.noise.solver(sampling.steps)
            for step in solver.timesteps:
                at, share = torch.full_like(keys, int(step)), int(step) / len(self.noise.signal)
                scale = sampling.scale(share)
                if scale == 1:
                    answer = self.predict(latent, at, condition).float()
                else:
                    answer = self._guided(latent, at, both, scale)
                answer = low_freq_guidance.steered(self.noise, latent, answer, int(step), wanted)
                now = scale, wanted is not None and low_freq_guidance.acts(share)
                if now != before:
                    solver.lower_order_nums = 0  # a slope between two models would mean nothing
                before = now
                latent = solver.step(answer, step, latent).prev_sample
            return latent

    def _guided(self, latent: Tensor, step: Tensor, both: Condition, scale: float) -> Tensor:
        answer = self.predict(latent.repeat(2, 1, 1, 1), step.repeat(2), both).float()
        right, null = answer.chunk(2)
        return null + scale * (right - null)

    def wanted(self, condition: Condition) -> Float[Tensor, "batch c cell cell"] | None:
        """Coarse latents of what the rays draw; None where the UNet draws all."""
        cells = self.conditioning.coarse
        if not cells or condition.map is None:
            return None
        drawing = self.conditioner.rays.drawing(condition.map)
        return low_freq_guidance.reference(self.frozen, drawing, self.tile, cells)

    def _halved(self) -> torch.autocast:
        """bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")


def require(directory: str) -> dict[str, Any]:
    """The record of a directory that `Generator.save` wrote.

    Raises:
        ValueError: it is none, or of another format; says what to do.
    """
    path = os.path.join(directory, _CONFIG)
    if not os.path.isfile(path):
        raise ValueError(
            f"generator {directory!r}: has no {_CONFIG}. Expected a local directory that "
            "cvmatch train-generator published; base models go to its --diffusion and --clip."
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
