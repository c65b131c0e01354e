"""Train the toy VAE's decoder against a discriminator, as Stable Diffusion's was.

A decoder that was trained for errors alone answers what a latent leaves open by a blur. The encoder
stays as it is, and with it all latents. After Rombach et al. 2022, appendix G, and Esser et al.
2021, section 3.2; the latents that a sampler would draw are an addition: A has nothing else.
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

from cvmatch.generate import coarse
from cvmatch.generate.noise import Noise
from cvmatch.toy.diffusion import encode, lost, shallow_of
from cvmatch.toy.optimise import running_mean
from cvmatch.toy.untrained import noise_schedule

log = logging.getLogger(__name__)

_BATCH = 16
"""Tiles of a step; half are decoded from their own latents, half from drawn ones."""

_RATE, _FASTER = 1e-4, 8
"""Learning rate of the decoder, and by which factor the discriminator's is higher. With 2 it never
told drawn from true (hinge loss 2.00), and the decoder's outlines turned black."""

_SHARE = 0.5
"""Gradient of the discriminator's term at the decoder's last weights, as a share of the others'."""

_STEPS = 10
"""Of the solver, of which a latent is noised to one of the first six."""

_CELLS = 8
"""Cells a side of what is coarse in a toy latent (`Conditioning.coarse`)."""


def sharpen(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    aerial: UInt8[Tensor, "tile 3 64 64"],
    classes: UInt8[Tensor, "tile 64 64"],
    features: nn.Module,
    steps: int,
) -> None:
    """Train the decoder to give tiles back (`lost`) and to draw what looks like them.

    From latents that `unet` drew, its pictures shall keep what the decoder drew of them before, in
    blocks of 4 x 4 pixels, and look like tiles.
    """
    for model in (vae, unet):
        model.to(aerial.device)  # pyright: ignore
    own = encode(vae, aerial)
    drawn = redrawn(unet, own, vae.config["scaling_factor"])
    shallow, judge = shallow_of(features).to(aerial.device), Discriminator().to(aerial.device)
    game = _Game(vae, copy.deepcopy(vae), judge, shallow, aerial, classes, own, drawn)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])  # pyright: ignore
    player, opponent = _Adam(decoder, _RATE, steps), _Adam(judge, _FASTER * _RATE, steps)
    mean = running_mean(decoder, 0.998)
    for step in range(steps):
        rows, others = torch.randint(len(aerial), (2, _BATCH), device=aerial.device)
        again, error = game.played(rows)
        fooled = game.fooled(again)
        player.step(error + _weight(error, fooled, vae.decoder.conv_out.weight) * fooled)
        told = game.told(again.detach(), others)
        opponent.step(told)
        mean.update_parameters(decoder)
        if (step + 1) % 50 == 0:
            values = error.item(), told.item()
            log.info("step %d of %d, error %.4f, hinge %.3f", step + 1, steps, *values)
    decoder.load_state_dict(mean.module.state_dict())


@torch.inference_mode()
def redrawn(
    unet: UNet2DConditionModel, latents: Float[Tensor, "tile channel 16 16"], scaling_factor: float
) -> Float[Tensor, "tile channel 16 16"]:
    """Latents as a sampler gives them: noised to a random step, and drawn again from there.

    Half of them are pulled to their own coarse part, as A is to what the rays draw.
    """
    noise = Noise(noise_schedule()).to(latents.device)
    parts = []
    for part in latents.split(64):
        clean = part.float() * scaling_factor
        wanted = coarse.shrunk(clean, _CELLS) if torch.rand(()) < 0.5 else None
        solver: Any = noise.solver(_STEPS)
        first = int(torch.randint(6, ()))
        solver.set_begin_index(first)
        tokens = clean.new_zeros(len(clean), 4, unet.config["cross_attention_dim"])
        at = solver.timesteps[first].expand(len(clean))
        x = noise.add(clean, torch.randn_like(clean), at)
        for step in solver.timesteps[first:]:
            at = step.expand(len(clean))
            answer = unet(x, step, tokens).sample
            if wanted is not None:
                clean = coarse.pulled(noise.clean(x, answer, at), wanted)
                answer = noise.implied(x, clean, at)
            x = solver.step(answer, step, x).prev_sample
        parts.append((x / scaling_factor).half())
    return torch.cat(parts)


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
        """Of RGB in [-1, 1]. The factor brings scores, whose slope is bounded, to the hinge."""
        return 10 * self.layers(picture).float()


@dataclass(frozen=True)
class _Game:
    """What the decoder and the discriminator are given; pictures are in [-1, 1]."""

    vae: AutoencoderKL
    before: AutoencoderKL
    judge: Discriminator
    shallow: nn.Module
    aerial: UInt8[Tensor, "tile 3 64 64"]
    classes: UInt8[Tensor, "tile 64 64"]
    own: Float[Tensor, "tile channel 16 16"]
    drawn: Float[Tensor, "tile channel 16 16"]

    def played(self, rows: Int64[Tensor, " row"]) -> tuple[Tensor, Tensor]:
        """Pictures of the rows, of the first half from their own latents, and their error."""
        half = len(rows) // 2
        latent = torch.cat([self.own[rows[:half]], self.drawn[rows[half:]]]).float()
        with self._halved():
            again = _decoded(self.vae, latent)
            with torch.no_grad():
                before = _decoded(self.before, latent[half:])
            true, classes = self._tiles(rows[:half]), self.classes[rows[:half]]
            error = lost(self.shallow, again[:half], true, classes)
            return again, error + _changed(again[half:], before)

    def fooled(self, again: Float[Tensor, "row 3 64 64"]) -> Tensor:
        """The decoder's adversarial loss."""
        with self._halved():
            return -self.judge(again).mean()

    def told(self, again: Float[Tensor, "row 3 64 64"], others: Int64[Tensor, " row"]) -> Tensor:
        """The discriminator's hinge loss of pictures, and of other true tiles."""
        with self._halved():
            drawn, true = self.judge(again), self.judge(self._tiles(others))
            return F.relu(1 + drawn).mean() + F.relu(1 - true).mean()

    def _tiles(self, rows: Tensor) -> Tensor:
        return self.aerial[rows].float() / 127.5 - 1

    def _halved(self) -> torch.autocast:
        return torch.autocast(self.aerial.device.type, torch.bfloat16)


class _Adam:
    """Adam for a game: short memory, and a rate that goes down to zero in the last third."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.weights = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.weights, rate, betas=(0.5, 0.9))
        self.plan = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: min(1, (n + 1) / 50, 3 * (1 - n / steps))
        )

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.plan.step()


def _decoded(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    return vae.decode(latent).sample.float()  # pyright: ignore


def _changed(again: Tensor, before: Tensor) -> Tensor:
    """Difference of blocks of 4 x 4 pixels, and a fifth of that of pixels."""
    blocks = F.l1_loss(F.avg_pool2d(again, 4), F.avg_pool2d(before, 4))
    return blocks + 0.2 * F.l1_loss(again, before)


def _weight(error: Tensor, fooled: Tensor, last: Tensor) -> Tensor:
    """Of the discriminator's term: its gradient at the `last` weights is _SHARE of the error's."""
    here, there = (
        torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, fooled)
    )
    return _SHARE * here / (there + 1e-6)
