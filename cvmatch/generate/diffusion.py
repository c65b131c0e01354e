"""The diffusion process: noise schedule, solver, and low-frequency guidance of sampling."""

import math
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

# The cosine schedule ends at alphas_cumprod of 5e-9, where lambda diverges; the value of
# DPM-Solver++'s authors for it (diffusers' documentation of `lambda_min_clipped`).
_LAMBDA_MIN = -5.1

_LOW_FREQ_STRENGTH = 0.85
"""Share of the difference that a step corrects (docs/decisions.md#low-frequency-guidance)."""

_LOW_FREQ_INTERVAL = 0.3
"""Guide the low frequencies while t / T >= this value: the last of six steps is the UNet's alone
(docs/decisions.md#low-frequency-guidance)."""


class NoiseSchedule(nn.Module):
    """The base model's schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""

    alphas_cumprod: Tensor

    def __init__(self, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.scheduler: Any = scheduler  # Any: diffusers annotates integer tensors by their class
        self.predicts_velocity = scheduler.config["prediction_type"] == "v_prediction"
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)

    def __len__(self) -> int:
        """Timesteps T, from 0 (clean) to T - 1."""
        return len(self.alphas_cumprod)

    def add_noise(
        self,
        latent: Float[Tensor, "batch c h w"],
        noise: Float[Tensor, "batch c h w"],
        timestep: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """Return noisy latents x_t."""
        return self.scheduler.add_noise(latent, noise, timestep)

    def target(
        self,
        latent: Float[Tensor, "batch c h w"],
        noise: Float[Tensor, "batch c h w"],
        timestep: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """Return what the UNet should predict: noise, or velocity (Salimans and Ho 2022)."""
        if self.predicts_velocity:
            return self.scheduler.get_velocity(latent, noise, timestep)
        return noise

    def predict_x0(
        self,
        noisy: Float[Tensor, "batch c h w"],
        model_pred: Float[Tensor, "batch c h w"],
        timestep: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """Return the clean latents that the UNet's prediction implies."""
        a, s = self._scales(timestep)
        if self.predicts_velocity:
            return a * noisy - s * model_pred
        return (noisy - s * model_pred) / a

    def prediction_from_x0(
        self,
        noisy: Float[Tensor, "batch c h w"],
        x0: Float[Tensor, "batch c h w"],
        timestep: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """Return the UNet's prediction that implies x0: the inverse of `predict_x0`."""
        a, s = self._scales(timestep)
        if self.predicts_velocity:
            return (a * noisy - x0) / s
        return (noisy - a * x0) / s

    def solver(self, steps: int, begin: int = 0) -> DPMSolverMultistepScheduler:
        """Return DPM-Solver++ (Lu et al. 2022) of second order; its first step is `begin`."""
        config = dict(self.scheduler.config)
        cosine = config["beta_schedule"] == "squaredcos_cap_v2"
        solver: Any = DPMSolverMultistepScheduler.from_config(
            config,
            timestep_spacing="linspace",  # "leading" would skip the last 7 % of the noise
            lambda_min_clipped=_LAMBDA_MIN if cosine else -math.inf,
        )
        solver.set_timesteps(steps, device=self.alphas_cumprod.device)
        solver.set_begin_index(begin)
        return solver

    def _scales(self, timestep: Int64[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t)."""
        alphas_cumprod = self.alphas_cumprod[timestep][:, None, None, None]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def guides_low_freq(noise_level: float) -> bool:
    """Return whether the low frequencies are guided at a noise level t / T, from 0 to 1."""
    return noise_level >= _LOW_FREQ_INTERVAL


def guide_low_freq(
    schedule: NoiseSchedule,
    noisy: Float[Tensor, "row c h w"],
    model_pred: Float[Tensor, "row c h w"],
    timestep: int,
    target: Float[Tensor, "row c cell cell"] | None,
) -> Float[Tensor, "row c h w"]:
    """Move the low frequencies of the predicted x0 towards `target`, as ILVR (Choi et al. 2021).

    Returns:
        The UNet's prediction that implies the moved x0; `model_pred` itself where `target` is None
        or there is too little noise.
    """
    if target is None or not guides_low_freq(timestep / len(schedule)):
        return model_pred
    steps = torch.full((len(noisy),), timestep, device=noisy.device)
    x0 = blend_low_freq(schedule.predict_x0(noisy, model_pred, steps), target)
    return schedule.prediction_from_x0(noisy, x0, steps)


def blend_low_freq(
    x0: Float[Tensor, "row c h w"], target: Float[Tensor, "row c cell cell"]
) -> Float[Tensor, "row c h w"]:
    """Return clean latents whose low frequencies are moved towards `target`."""
    difference = target - downsample(x0, target.shape[-1])
    return x0 + _LOW_FREQ_STRENGTH * F.interpolate(difference, x0.shape[-2:], mode="bicubic")


def downsample(
    latent: Float[Tensor, "row c h w"], size: int
) -> Float[Tensor, "row c {size} {size}"]:
    """Return the low frequencies of latents, `size` cells a side."""
    return F.interpolate(latent, (size, size), mode="bilinear", antialias=True)
