"""Train the toy VAE's decoder on, when there is a generator: from latents such as A's.

The encoder stays as it is, and with it all latents. From few nats errors alone draw a roof as a
disc, since its corners are not told; a decoder that plays against a discriminator draws what a tile
would have there.
"""

import copy
import functools
import logging
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.data.schema import LABELS
from cvmatch.generate.model import Generator
from cvmatch.runtime import hardware
from cvmatch.training.ema import EMA
from tools.demo_models.adversary import Adversary
from tools.demo_models.autoencoder import cut_shallow, decode, perceptual_loss, scale_pixels
from tools.demo_models.optimise import descend, make_schedule

log = logging.getLogger(__name__)

_OWN, _DRAWN = 12, 20
"""Tiles of a step that are decoded from their own latents, and from what a generator drew of their
panorama."""

_RATE = 1.5e-4
"""Learning rate."""

_SHARE = 1.0
"""Gradient of the adversarial term at the pictures, as a share of the errors'."""

_BUILT, _OFTEN = 0.06, 0.6
"""Share of buildings from which on a tile is drawn often, and how often: in this share of the rows.
Roofs are what a decoder finds hardest."""

_OWN_BLOCK, _DRAWN_BLOCK = 4, 8
"""Pixels a side of the blocks whose colours a picture shall keep. A roof is five to eight wide."""


@dataclass(frozen=True)
class Latents:
    """Tiles, and a latent of each that is not scaled."""

    aerial: UInt8[Tensor, "tile 3 64 64"]
    classes: UInt8[Tensor, "tile 64 64"]
    latent: Float[Tensor, "tile channel 16 16"]

    def rows(self, number: int) -> Int64[Tensor, " row"]:
        """Rows at random, tiles with buildings often."""
        at, rich = self.classes.device, self._built
        rows = torch.randint(len(self.classes), (number,), device=at)
        if not len(rich):
            return rows
        often = rich[torch.randint(len(rich), (number,), device=at)]
        return torch.where(torch.rand(number, device=at) < _OFTEN, often, rows)

    @functools.cached_property
    def _built(self) -> Int64[Tensor, " row"]:
        share = (self.classes == LABELS.index("building")).float().mean((1, 2))
        return (share > _BUILT).nonzero()[:, 0]


def pretrain_decoder(
    vae: AutoencoderKL, own: Latents, drawn: Latents, features: nn.Module, steps: int
) -> None:
    """Train to draw what looks like tiles, of the colours that a latent tells.

    Those are the tile's for its own latent, and what the decoder drew before for one that a
    generator drew: of such a latent there is no true picture.
    """
    device = own.latent.device
    vae.to(device)  # pyright: ignore
    trained = nn.ModuleList([vae.decoder, vae.post_quant_conv])  # pyright: ignore
    before, shallow = copy.deepcopy(vae), cut_shallow(features).to(device)
    adversary, plan = Adversary(steps, device), make_schedule(trained, _RATE, steps)
    mean = EMA(0.998)
    for step in range(steps):
        first, others = own.rows(_OWN), drawn.rows(_DRAWN)
        true = scale_pixels(torch.cat([own.aerial[first], drawn.aerial[others]]))
        latent = torch.cat([own.latent[first], drawn.latent[others]]).float()
        with hardware.autocast(device):
            again = decode(vae, latent)
            with torch.no_grad():
                wanted = decode(before, latent[_OWN:])
            error = _apart(again[:_OWN], true[:_OWN], _OWN_BLOCK, 0.1)
            error = error + 0.05 * perceptual_loss(shallow, again[:_OWN], true[:_OWN])
            error = error + _apart(again[_OWN:], wanted, _DRAWN_BLOCK, 0.03)
        descend(plan, adversary.joined(error, again, true, _SHARE))
        mean.update(trained.parameters())
        adversary.learn(again, true)
        if (step + 1) % 50 == 0:
            told = error.item(), adversary.recent
            log.info("step %d of %d, error %.4f, discriminator %.3f", step + 1, steps, *told)
    mean.copy_to(trained.parameters())


@torch.inference_mode()
def sample_latents(
    generator: Generator,
    panorama: UInt8[Tensor, "pair 3 64 256"],
    aerial: UInt8[Tensor, "pair 3 64 64"],
    classes: UInt8[Tensor, "pair 64 64"],
) -> Latents:
    """What the generator draws of the tiles' panoramas."""
    keys = torch.arange(len(panorama), device=aerial.device)
    parts = [
        generator.sample_latents(generator.encoders.encode_panorama(part.float() / 255), key)
        for part, key in zip(panorama.split(64), keys.split(64), strict=True)
    ]
    scale = generator.encoders.vae.config["scaling_factor"]
    return Latents(aerial, classes, torch.cat(parts) / scale)


def _apart(again: Tensor, wanted: Tensor, block: int, detail: float) -> Tensor:
    """Difference of the blocks' colours, and `detail` times that of pixels."""
    blocks = F.l1_loss(F.avg_pool2d(again, block), F.avg_pool2d(wanted, block))
    return blocks + detail * F.l1_loss(again, wanted)
