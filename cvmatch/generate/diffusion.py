"""The noise schedule of the base model: noising, the UNet's target, and the way back."""

import math
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from jaxtyping import Float, Int64
from torch import Tensor, nn

# The cosine schedule ends at a signal of 5e-9, where lambda diverges; the value of DPM-Solver++'s
# authors for it (diffusers' documentation of `lambda_min_clipped`).
_LAMBDA_MIN = -5.1


class Noise(nn.Module):
    """x_t = a x_0 + s noise, where a^2 = `signal[t]` and a^2 + s^2 = 1."""

    signal: Tensor

    def __init__(self, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.velocity = scheduler.config["prediction_type"] == "v_prediction"
        self.register_buffer("signal", scheduler.alphas_cumprod.clone(), persistent=False)

    def add(
        self,
        latent: Float[Tensor, "batch c h w"],
        noise: Float[Tensor, "batch c h w"],
        step: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """Noisy latents at `step`, from 0 (clean) to `len(signal)` - 1."""
        a, s = self._mix(step)
        return a * latent + s * noise

    def target(
        self,
        latent: Float[Tensor, "batch c h w"],
        noise: Float[Tensor, "batch c h w"],
        step: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """What the UNet should answer: noise, or v = a noise - s x_0 (Salimans and Ho 2022)."""
        a, s = self._mix(step)
        return a * noise - s * latent if self.velocity else noise

    def clean(
        self,
        noisy: Float[Tensor, "batch c h w"],
        answer: Float[Tensor, "batch c h w"],
        step: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """x0_hat that the UNet's answer implies: (x_t - s eps) / a, or a x_t - s v."""
        a, s = self._mix(step)
        return a * noisy - s * answer if self.velocity else (noisy - s * answer) / a

    def implied(
        self,
        noisy: Float[Tensor, "batch c h w"],
        clean: Float[Tensor, "batch c h w"],
        step: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch c h w"]:
        """The answer that implies x0_hat = `clean`: the inverse of the method `clean`."""
        a, s = self._mix(step)
        return (a * noisy - clean) / s if self.velocity else (noisy - a * clean) / s

    def weight(self, step: Int64[Tensor, " batch"], gamma: float) -> Float[Tensor, " batch"]:
        """Min-SNR weight of the squared error of the answer (Hang et al. 2023); 1 for gamma 0.

        min(SNR, gamma) times the error of x_0, written for what the UNet answers.
        """
        if not gamma:
            return torch.ones_like(self.signal[step])
        ratio = self.signal[step] / (1 - self.signal[step])
        return ratio.clamp(max=gamma) / (ratio + 1 if self.velocity else ratio)

    def solver(self, steps: int) -> DPMSolverMultistepScheduler:
        """DPM-Solver++ (Lu et al. 2022) of second order, set to `steps` steps from pure noise."""
        config = dict(self.scheduler.config)
        cosine = config["beta_schedule"] == "squaredcos_cap_v2"
        solver: Any = DPMSolverMultistepScheduler.from_config(
            config,
            timestep_spacing="linspace",  # "leading" would skip the last 7 % of the noise
            lambda_min_clipped=_LAMBDA_MIN if cosine else -math.inf,
        )
        solver.set_timesteps(steps, device=self.signal.device)
        return solver

    def _mix(self, step: Int64[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        signal = self.signal[step][:, None, None, None]
        return signal.sqrt(), (1 - signal).sqrt()
