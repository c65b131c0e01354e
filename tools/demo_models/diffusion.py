"""Pre-train the toy UNet, from latents in memory."""

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from tools.demo_models.optimise import optimise
from tools.demo_models.untrained import build_noise_scheduler


def pretrain_unet(
    unet: UNet2DConditionModel,
    latents: Float[Tensor, "tile channel 16 16"],
    scaling_factor: float,
    steps: int,
) -> None:
    """Train to denoise latents of tiles without condition (its tokens are zero)."""
    unet.to(latents.device, memory_format=torch.channels_last)  # pyright: ignore
    scheduler = build_noise_scheduler()
    nothing = latents.new_zeros(1, 4, unet.config["cross_attention_dim"], dtype=torch.float32)

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        clean = latents[rows].float() * scaling_factor
        noise = torch.randn_like(clean)
        step = _noise_steps(len(rows)).to(rows.device)
        target = scheduler.get_velocity(clean, noise, step)  # pyright: ignore
        noisy = scheduler.add_noise(clean, noise, step)  # pyright: ignore
        return F.mse_loss(
            unet(noisy, step, nothing.expand(len(rows), -1, -1)).sample.float(), target
        )

    optimise(unet, loss, len(latents), steps, batch=512, rate=1.5e-3, decay=0.999, bfloat16=True)


def _noise_steps(rows: int) -> Int64[Tensor, " row"]:
    """Steps of the schedule, from 0 to 999: half from all, half (logit-normal) from the middle.

    There shapes are decided; nearly nothing can be learned above 750 (loss 0.91 of 1).
    """
    middle = 1000 * torch.sigmoid(0.8 * torch.randn(rows) - 0.4)
    return torch.where(torch.rand(rows) < 0.5, 1000 * torch.rand(rows), middle).long()
