"""Train the toy VAE's decoder against a discriminator, as Stable Diffusion's was.

A decoder that was trained for errors alone answers what a latent leaves open by a blur. The encoder
stays as it is, and with it all latents. After Rombach et al. 2022, appendix G, and Esser et al.
2021, section 3.1; that half of the latents are what a sampler would draw is an addition, since A
has no others.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import LambdaLR

from cvmatch.generate import coarse
from cvmatch.generate.adapt import Average
from cvmatch.generate.condition import Conditioning
from cvmatch.generate.noise import Noise
from cvmatch.toy.diffusion import encode, no_tokens, reconstruction_loss, scaled, shallow_of
from cvmatch.toy.optimise import descend
from cvmatch.toy.untrained import noise_schedule

log = logging.getLogger(__name__)

_BATCH = 16
"""Tiles of a step; half are decoded from their own latents, half from drawn ones."""

_DECODER_RATE, _DISCRIMINATOR_RATE = 1e-4, 8e-4
"""Learning rates. With twice the decoder's the discriminator never told drawn from true (hinge loss
2.00), and outlines turned black."""

_SHARE = 0.5
"""Gradient of the adversarial term at the decoder's last weights, as a share of the others'."""

_STEPS, _FIRST = 10, 6
"""Of the solver, and at how many of them a latent's drawing may begin: the first is pure noise, the
sixth at 44 % of the schedule, below which the base changes little."""

_PART = 64
"""Tiles that are drawn again from the same step, pulled or not."""


def sharpen(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    aerial: UInt8[Tensor, "tile 3 64 64"],
    classes: UInt8[Tensor, "tile 64 64"],
    features: nn.Module,
    steps: int,
) -> None:
    """Train the decoder to give tiles back, and to draw what looks like tiles.

    From latents that `unet` drew its pictures shall look like tiles, too, and stay near what the
    decoder drew of them before: there is no true picture of them.
    """
    for model in (vae, unet):
        model.to(aerial.device)  # pyright: ignore
    own = encode(vae, aerial)
    drawn = torch.cat([_redrawn(unet, part, vae) for part in own.split(_PART)])
    tiles = _Tiles(aerial, classes, own, drawn)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])  # pyright: ignore
    before, shallow = copy.deepcopy(vae), shallow_of(features).to(aerial.device)
    discriminator = Discriminator().to(aerial.device)
    decoder_plan = _planned(decoder, _DECODER_RATE, steps)
    discriminator_plan = _planned(discriminator, _DISCRIMINATOR_RATE, steps)
    mean = Average(0.998)
    for step in range(steps):
        with torch.autocast(aerial.device.type, torch.bfloat16):
            rows, others = torch.randint(len(aerial), (2, _BATCH), device=aerial.device)
            again, error = tiles.decoded(vae, before, shallow, rows)
            adversarial = adversarial_loss(discriminator, again)
        weight = adaptive_weight(error, adversarial, vae.decoder.conv_out.weight)
        descend(decoder_plan, error + weight * adversarial)
        with torch.autocast(aerial.device.type, torch.bfloat16):
            hinge = hinge_loss(discriminator, again.detach(), scaled(aerial[others]))
        descend(discriminator_plan, hinge)
        mean.update(decoder.parameters())
        if (step + 1) % 50 == 0:
            values = error.item(), hinge.item()
            log.info("step %d of %d, error %.4f, hinge %.3f", step + 1, steps, *values)
    mean.copy_to(decoder.parameters())


class Discriminator(nn.Module):
    """Score of each patch of 28 x 28 pixels, high where it looks like a true tile's."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((3, 32, 3, 1), (32, 64, 4, 2), (64, 96, 4, 2), (96, 96, 3, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in shapes:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1)
            layers += [spectral_norm(conv), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(96, 1, 3, padding=1)))

    def forward(self, picture: Float[Tensor, "row 3 64 64"]) -> Float[Tensor, "row 1 16 16"]:
        """Of RGB in [-1, 1].

        Spectral normalisation bounds the slope; times 10, scores can reach the hinge's margins.
        """
        return 10 * self.layers(picture).float()


def adversarial_loss(
    discriminator: nn.Module, drawn: Float[Tensor, "row 3 64 64"]
) -> Float[Tensor, ""]:
    """The decoder's: less where its pictures look like tiles."""
    return -discriminator(drawn).mean()


def hinge_loss(
    discriminator: nn.Module,
    drawn: Float[Tensor, "row 3 64 64"],
    true: Float[Tensor, "row 3 64 64"],
) -> Float[Tensor, ""]:
    """The discriminator's: 0 if true tiles score above 1 and drawn ones below -1, 2 if blind."""
    return F.relu(1 + discriminator(drawn)).mean() + F.relu(1 - discriminator(true)).mean()


def adaptive_weight(error: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Of the adversarial term, whose gradient at the `last` weights becomes _SHARE of the error's.

    Equation 7 of Esser et al. 2021.
    """
    here, there = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (error, adversarial)
    )
    return _SHARE * here / (there + 1e-6)


@torch.inference_mode()
def redrawn(
    unet: UNet2DConditionModel,
    latents: Float[Tensor, "tile channel 16 16"],
    first: int,
    pull: bool,
) -> Float[Tensor, "tile channel 16 16"]:
    """Scaled latents, noised to step `first` of the solver's ten and drawn again from there.

    With `pull` to their own coarse part, as A is to that of what the rays draw.
    """
    noise = Noise(noise_schedule()).to(latents.device)
    solver: Any = noise.solver(_STEPS)
    solver.set_begin_index(first)
    wanted = coarse.shrunk(latents, Conditioning.coarse) if pull else None
    tokens = no_tokens(unet, latents)
    x = noise.add(latents, torch.randn_like(latents), _everywhere(solver.timesteps[first], latents))
    for step in solver.timesteps[first:]:
        answer = unet(x, step, tokens).sample
        answer = coarse.steered(noise, x, answer, _everywhere(step, latents), wanted)
        x = solver.step(answer, step, x).prev_sample
    return x


@dataclass(frozen=True)
class _Tiles:
    """What the decoder is trained on."""

    aerial: UInt8[Tensor, "tile 3 64 64"]
    classes: UInt8[Tensor, "tile 64 64"]
    own: Float[Tensor, "tile channel 16 16"]
    drawn: Float[Tensor, "tile channel 16 16"]

    def decoded(
        self,
        vae: AutoencoderKL,
        before: AutoencoderKL,
        shallow: nn.Module,
        rows: Int64[Tensor, " row"],
    ) -> tuple[Tensor, Tensor]:
        """Pictures of rows, of the first half from their own latents, and their error."""
        half = len(rows) // 2
        latent = torch.cat([self.own[rows[:half]].float(), self.drawn[rows[half:]].float()])
        again = _decode(vae, latent)
        with torch.no_grad():
            old = _decode(before, latent[half:])
        true, classes = scaled(self.aerial[rows[:half]]), self.classes[rows[:half]]
        error = reconstruction_loss(shallow, again[:half], true, classes)
        return again, error + _changed(again[half:], old)


def _planned(model: nn.Module, rate: float, steps: int) -> LambdaLR:
    """Adam with a short memory, a warm-up of 50 steps, and a rate that ends at zero."""
    adam = torch.optim.Adam(model.parameters(), rate, betas=(0.5, 0.9))
    return LambdaLR(adam, lambda n: min(1, (n + 1) / 50, 3 * (1 - n / steps)))


def _redrawn(unet: UNet2DConditionModel, part: Tensor, vae: AutoencoderKL) -> Tensor:
    scale = vae.config["scaling_factor"]
    first, pull = int(torch.randint(_FIRST, ())), bool(torch.rand(()) < 0.5)
    return (redrawn(unet, part.float() * scale, first, pull) / scale).half()


def _decode(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    return vae.decode(latent).sample.float()  # pyright: ignore


def _changed(again: Tensor, before: Tensor) -> Tensor:
    """Difference of blocks of 4 x 4 pixels, which shall stay, and a fifth of that of pixels."""
    blocks = F.l1_loss(F.avg_pool2d(again, 4), F.avg_pool2d(before, 4))
    return blocks + 0.2 * F.l1_loss(again, before)


def _everywhere(step: Tensor, latents: Tensor) -> Tensor:
    return step.expand(len(latents))
