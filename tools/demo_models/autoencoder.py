"""Pre-train the toy VAE as Stable Diffusion's was: of few nats, with a decoder that draws the rest.

After Rombach et al. 2022, appendix G. A tile's latent keeps what a UNet can learn to draw (where
roads and roofs are, and their colours); the decoder adds edges and texture, since a discriminator
sees its pictures.
"""

import logging

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.data.schema import LABELS
from cvmatch.nn import metrics
from cvmatch.nn.backbones import normalise
from cvmatch.runtime import hardware
from cvmatch.training.ema import EMA
from tools.demo_models.adversary import Adversary
from tools.demo_models.optimise import descend, make_schedule, rotate_at_random

log = logging.getLogger(__name__)

_BATCH, _MEANS = 32, 8
"""Tiles of a step, and how many of them are drawn from the mean of their latent, as what a UNet
draws will be; the others, from a sample. Only samples teach the encoder: from means it would learn
to write without limit."""

_RATE = 1.5e-4
"""Learning rate. At 4e-4 the latents collapsed."""

_NATS = 1e-5, 3e-4
"""Weight of a nat at the start and from 60 % of the steps on. 3e-5 keeps 1,700 nats of a tile, 6e-5
1,400, 3e-4 350, and roofs in all; at once, 1e-4 collapses."""

_SHARE = 0.5
"""Gradient of the adversarial term at the pictures, as a share of the errors'."""


def pretrain_vae(
    vae: AutoencoderKL,
    aerial: UInt8[Tensor, "tile 3 64 64"],
    classes: UInt8[Tensor, "tile 64 64"],
    features: nn.Module,
    steps: int,
) -> None:
    """Train to give tiles back (`reconstruction_loss`) from few nats, and pictures like tiles."""
    vae.to(aerial.device)  # pyright: ignore
    shallow = cut_shallow(features).to(aerial.device)
    adversary, plan = Adversary(steps, aerial.device), make_schedule(vae, _RATE, steps)
    both, mean = torch.cat([aerial, classes[:, None]], dim=1), EMA(0.998)
    for step in range(steps):
        shown = rotate_at_random(both[torch.randint(len(aerial), (_BATCH,), device=aerial.device)])
        image, weight = scale_pixels(shown[:, :3]), pixel_weight(shown[:, 3])
        with hardware.autocast(aerial.device):
            latent = vae.encode(image).latent_dist  # pyright: ignore
            z = _seen(latent)
            again = decode(vae, z)
            error = reconstruction_loss(shallow, again, image, weight)
            rest = _shrunk_loss(vae, shallow, z[_MEANS:], image[_MEANS:], weight[_MEANS:])
            rest = 0.5 * rest + _nat_weight(step / steps) * latent.kl().mean()
        descend(plan, adversary.joined(error, again, image, _SHARE) + rest)
        mean.update(vae.parameters())
        adversary.learn(again, image)
        if (step + 1) % 50 == 0:
            told = latent.kl().mean().item(), adversary.recent
            log.info("step %d of %d, %.0f nats, discriminator %.3f", step + 1, steps, *told)
    mean.copy_to(vae.parameters())
    latents = encode(vae, aerial[:512])
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())


def reconstruction_loss(
    shallow: nn.Module,
    again: Float[Tensor, "tile 3 size size"],
    image: Float[Tensor, "tile 3 size size"],
    weight: Float[Tensor, "tile 1 size size"],
) -> Tensor:
    """Absolute and squared error of pixels in [-1, 1], and a fifth of the perceptual (`shallow`).

    `weight` is of the pixels' part.
    """
    apart = (again - image).abs()
    pixels = (weight * (apart + apart.square())).sum() / (3 * weight.sum())
    return pixels + 0.2 * perceptual_loss(shallow, again, image)


def perceptual_loss(
    shallow: nn.Module,
    again: Float[Tensor, "tile 3 size size"],
    image: Float[Tensor, "tile 3 size size"],
) -> Tensor:
    """Difference of the features of pictures in [-1, 1], as a share of the features."""
    seen, wanted = (shallow(normalise(x / 2 + 0.5)) for x in (again, image))
    return F.l1_loss(seen, wanted) / wanted.abs().mean()


def pixel_weight(classes: UInt8[Tensor, "tile 64 64"]) -> Float[Tensor, "tile 1 64 64"]:
    """Buildings count five times.

    A roof is five pixels wide, and the median of a red roof in a green garden, which an absolute
    error alone draws, is green.
    """
    return 1.0 + 4 * (classes == LABELS.index("building"))[:, None]


def scale_pixels(tile: UInt8[Tensor, "*batch 64 64"]) -> Float[Tensor, "*batch 64 64"]:
    """Bytes as the VAE takes them, in [-1, 1]."""
    return tile.float() / 127.5 - 1


def cut_shallow(features: nn.Module) -> nn.Module:
    """The first layers of a tower's convolutions, fixed: what `reconstruction_loss` compares by."""
    return nn.Sequential(*list(features.children())[:7]).requires_grad_(False)


@torch.inference_mode()
def encode(
    vae: AutoencoderKL, aerial: UInt8[Tensor, "tile 3 64 64"]
) -> Float[Tensor, "tile channel 16 16"]:
    """Latent means, not scaled, in half precision."""
    parts = [
        vae.encode(scale_pixels(part)).latent_dist.mode().half()  # pyright: ignore
        for part in aerial.split(256)
    ]
    return torch.cat(parts)


def decode(
    vae: AutoencoderKL, latent: Float[Tensor, "tile channel cell cell"]
) -> Float[Tensor, "tile 3 size size"]:
    """Pictures in [-1, 1], or little beyond, of latents that are not scaled."""
    return vae.decode(latent).sample.float()  # pyright: ignore


@torch.inference_mode()
def measure_reconstruction(vae: AutoencoderKL, aerial: UInt8[Tensor, "tile 3 64 64"]) -> float:
    """Mean PSNR in dB of tiles that went through the VAE and back."""
    image = aerial.float() / 255
    again = decode(vae, encode(vae, aerial).float()) / 2 + 0.5
    return metrics.psnr(again.clamp(0, 1), image).mean().item()


def _seen(latent: DiagonalGaussianDistribution) -> Float[Tensor, "tile channel 16 16"]:
    """What the decoder is shown: of the first ones the means, of the others samples."""
    return torch.cat([latent.mode()[:_MEANS].detach(), latent.sample()[_MEANS:]])


def _shrunk_loss(
    vae: AutoencoderKL, shallow: nn.Module, latent: Tensor, image: Tensor, weight: Tensor
) -> Tensor:
    """A shrunk latent shall give the shrunk tile (Kouzelis et al. 2025; Skorokhodov et al. 2025).

    What is coarse in a tile then is what is coarse in its latent, and a UNet can tell more of it
    from noise: its held-out loss fell from 0.69 to 0.61, and with few nats to 0.55.
    """
    small, *true = (F.avg_pool2d(x, 2) for x in (latent, image, weight))
    return reconstruction_loss(shallow, decode(vae, small), *true)


def _nat_weight(part: float) -> float:
    """Weight of a nat when that part of the steps is done."""
    first, last = _NATS
    return first * (last / first) ** min(1, part / 0.6)
