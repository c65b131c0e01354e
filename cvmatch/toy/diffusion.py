"""Pre-train the toy diffusion model's parts, from tiles in memory: the VAE, then the UNet."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch import metrics
from cvmatch.schema import LABELS
from cvmatch.towers import normalise
from cvmatch.toy.optimise import optimise, turned
from cvmatch.toy.untrained import noise_schedule


def pretrain_vae(
    vae: AutoencoderKL,
    aerial: UInt8[Tensor, "tile 3 64 64"],
    classes: UInt8[Tensor, "tile 64 64"],
    features: nn.Module,
    steps: int,
) -> None:
    """Train to give a tile back (`reconstruction_loss`) from few nats."""
    vae.to(aerial.device)  # pyright: ignore
    shallow = shallow_of(features).to(aerial.device)
    both = torch.cat([aerial, classes[:, None]], dim=1)

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        shown = turned(both[rows])
        image = scaled(shown[:, :3])
        latent = vae.encode(image).latent_dist  # pyright: ignore
        again = vae.decode(latent.sample()).sample  # pyright: ignore
        # 1e-5 keeps 2,100 nats of a tile, 3e-5 1,500 and no less of the picture, 1.5e-4 470 and
        # no roofs.
        return reconstruction_loss(shallow, again, image, shown[:, 3]) + 3e-5 * latent.kl().mean()

    optimise(vae, loss, len(aerial), steps, batch=128, rate=1.5e-3, decay=0.998, bfloat16=True)
    latents = encode(vae, aerial[:512])
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())


def reconstruction_loss(
    shallow: nn.Module,
    again: Float[Tensor, "tile 3 64 64"],
    image: Float[Tensor, "tile 3 64 64"],
    classes: UInt8[Tensor, "tile 64 64"],
) -> Tensor:
    """Absolute and squared error of pixels in [-1, 1], and a fifth of the perceptual (`shallow`).

    Buildings count five times in the pixels' part: a roof is five pixels wide, and the median of a
    red roof in a green garden, which an absolute error alone draws, is green.
    """
    weight = 1 + 4 * (classes == LABELS.index("building"))[:, None]
    seen, wanted = (shallow(normalise(x / 2 + 0.5)) for x in (again, image))
    perceptual = F.l1_loss(seen, wanted) / wanted.abs().mean()
    apart = (again - image).abs()
    pixels = (weight * (apart + apart.square())).sum() / (3 * weight.sum())
    return pixels + 0.2 * perceptual


def scaled(tile: UInt8[Tensor, "*batch 64 64"]) -> Float[Tensor, "*batch 64 64"]:
    """Bytes as the VAE takes them, in [-1, 1]."""
    return tile.float() / 127.5 - 1


def no_tokens(
    unet: UNet2DConditionModel, latents: Float[Tensor, "row c h w"]
) -> Float[Tensor, "row 4 width"]:
    """What the UNet attends to without a condition: zeros."""
    return latents.new_zeros(len(latents), 4, unet.config["cross_attention_dim"])


def shallow_of(features: nn.Module) -> nn.Module:
    """The first layers of a tower's convolutions, fixed: what `reconstruction_loss` compares by."""
    return nn.Sequential(*list(features.children())[:7]).requires_grad_(False)


@torch.inference_mode()
def encode(
    vae: AutoencoderKL, aerial: UInt8[Tensor, "tile 3 64 64"]
) -> Float[Tensor, "tile channel 16 16"]:
    """Latent means, not scaled, in half precision."""
    parts = [
        vae.encode(scaled(part)).latent_dist.mode().half()  # pyright: ignore
        for part in aerial.split(256)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def kept(vae: AutoencoderKL, aerial: UInt8[Tensor, "tile 3 64 64"]) -> float:
    """Mean PSNR in dB of tiles that went through the VAE and back."""
    image = aerial.float() / 255
    again = vae.decode(encode(vae, aerial).float()).sample / 2 + 0.5  # pyright: ignore
    return metrics.psnr(again.clamp(0, 1), image).mean().item()


def pretrain_unet(
    unet: UNet2DConditionModel,
    latents: Float[Tensor, "tile channel 16 16"],
    scaling_factor: float,
    steps: int,
) -> None:
    """Train to denoise latents of tiles without condition (its tokens are zero)."""
    unet.to(latents.device, memory_format=torch.channels_last)  # pyright: ignore
    scheduler = noise_schedule()

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        clean = latents[rows].float() * scaling_factor
        noise = torch.randn_like(clean)
        step = _noise_steps(len(rows)).to(rows.device)
        target = scheduler.get_velocity(clean, noise, step)  # pyright: ignore
        noisy = scheduler.add_noise(clean, noise, step)  # pyright: ignore
        return F.mse_loss(unet(noisy, step, no_tokens(unet, clean)).sample.float(), target)

    optimise(unet, loss, len(latents), steps, batch=512, rate=1.5e-3, decay=0.999, bfloat16=True)


def _noise_steps(rows: int) -> Int64[Tensor, " row"]:
    """Steps of the schedule, from 0 to 999: half from all, half (logit-normal) from the middle.

    There shapes are decided; nearly nothing can be learned above 750 (loss 0.91 of 1).
    """
    middle = 1000 * torch.sigmoid(0.8 * torch.randn(rows) - 0.4)
    return torch.where(torch.rand(rows) < 0.5, 1000 * torch.rand(rows), middle).long()
