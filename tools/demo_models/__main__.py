"""Make the base models of the demo again, in the on-disk formats of the real ones.

    python -m tools.demo_models --output DIR

renders worlds that no data set contains, and trains the tower, the VAE, the UNet, its decoder,
CLIP and SegFormer one after another. VAE, UNet and decoder take minutes of an H200 and hours of two
cores, the others an hour of two cores. `--start DIR` trains models on that are there already.
"""

import functools
import logging
import os
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import UInt8
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from cvmatch.config import parse
from cvmatch.demo.models import CLIP, DIFFUSION, MODELS, SEGFORMER, TOWER
from cvmatch.demo.samples import SIZES, PairArrays, render_places, render_tile_arrays
from cvmatch.generate.model import Generator
from cvmatch.nn import backbones
from cvmatch.runtime import hardware
from tools.demo_models import autoencoder, decoder, diffusion, pretrain, untrained

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

Name = Literal["tower", "vae", "unet", "decoder", "clip", "segformer"]

STEPS: dict[Name, int] = {
    "tower": 400,
    "vae": 6000,
    "unet": 2311,
    "decoder": 5500,
    "clip": 500,
    "segformer": 500,
}
"""Optimizer steps. How the package's weights came about: docs/decisions.md#embedded-base-models."""

HELD_OUT = 512
"""Last tiles, which the VAE and the UNet do not see."""

_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-train the toy base models on worlds that no data set contains."""

    models: tuple[Name, ...] = ("tower", "vae", "unet", "clip", "segformer")
    """Which; in this order: the VAE needs the tower, and the UNet the VAE. `decoder` trains that of
    the VAE on, with a generator that was trained from these models."""
    generator: str = ""
    """Local directory of that generator (cvmatch train-generator)."""
    worlds: int = 160
    """Worlds whose pairs the tower, CLIP and the SegFormer see, of 24 pairs each."""
    tile_worlds: int = 1600
    """Worlds whose tiles the VAE and the UNet see, of 24 tiles each."""
    effort: float = 1.0
    """Factor on the number of optimizer steps."""
    start: str = ""
    """Local directory of such models, whose VAE and UNet are trained on; empty: random weights."""
    output: str = MODELS
    """Local directory of the models."""
    seed: int = 0
    """Seed of the worlds, the weights and the batches."""

    def __post_init__(self) -> None:
        if "decoder" in self.models and not self.generator:
            raise ValueError(
                "toy: --models decoder needs --generator, a local directory that "
                "cvmatch train-generator published."
            )


@dataclass(frozen=True)
class ModelMaker:
    """Each method makes one model and saves it as soon as it is done."""

    config: Pretrain
    device: torch.device

    def tower(self, steps: int) -> None:
        """From pairs."""
        tiles, panoramas = _planes(self.pairs.aerial), _planes(self.pairs.panorama)
        tower = pretrain.pretrain_tower(tiles, panoramas, self.shares, steps)
        backbones.save_tower(tower.half(), self.at(TOWER))

    def vae(self, steps: int) -> None:
        """From tiles, their classes and the tower."""
        stack = backbones.load_vgg_features(self.at(TOWER)).float()
        vae = self.begun("vae", untrained.build_vae())
        aerial, classes = self.tiles
        autoencoder.pretrain_vae(vae, aerial[:-HELD_OUT], classes[:-HELD_OUT], stack, steps)
        log.info(
            "vae: %.1f dB on held-out tiles",
            autoencoder.measure_reconstruction(vae, aerial[-HELD_OUT:]),
        )
        _save(vae, self.part("vae"))

    def unet(self, steps: int) -> None:
        """From tiles and the VAE."""
        vae = AutoencoderKL.from_pretrained(self.part("vae")).to(self.device)  # pyright: ignore
        aerial = self.tiles[0][:-HELD_OUT]
        both = [aerial, aerial.flip(-1)]
        turned = [torch.rot90(tiles, turns, (-2, -1)) for tiles in both for turns in range(4)]
        latents = torch.cat([autoencoder.encode(vae, part) for part in turned])
        unet = self.begun("unet", untrained.build_unet(latents.shape[1]))
        diffusion.pretrain_unet(unet, latents, vae.config["scaling_factor"], steps)
        _save(unet, self.part("unet"))
        untrained.build_noise_scheduler().save_pretrained(self.part("scheduler"))

    def decoder(self, steps: int) -> None:
        """The VAE's, on: from tiles, the tower, pairs and a generator."""
        vae = AutoencoderKL.from_pretrained(self.part("vae")).to(self.device)  # pyright: ignore
        generator = Generator.load(self.config.generator, self.device)
        stack = backbones.load_vgg_features(self.at(TOWER)).float()
        aerial, tile_classes = (part[:-HELD_OUT] for part in self.tiles)
        own = decoder.Latents(aerial, tile_classes, autoencoder.encode(vae, aerial))
        classes = torch.from_numpy(self.pairs.classes)[:, ::2, ::2]  # of twice a small tile's side
        pairs = (_planes(self.pairs.panorama), self.small, classes)
        drawn = decoder.sample_latents(generator, *(part.to(self.device) for part in pairs))
        decoder.pretrain_decoder(vae, own, drawn, stack, steps)
        _save(vae, self.part("vae"))

    def clip(self, steps: int) -> None:
        """From pairs, none of which it sees together."""
        side, panoramas = untrained.TILE, _planes(self.pairs.panorama)
        clip = pretrain.pretrain_clip(self.small, panoramas, self.shares, steps)
        _save(clip, self.at(CLIP))
        processor = CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=backbones.MEAN,
            image_std=backbones.STD,
        )
        processor.save_pretrained(self.at(CLIP))

    def segformer(self, steps: int) -> None:
        """From tiles and their class maps."""
        tiles, classes = _planes(self.pairs.aerial), torch.from_numpy(self.pairs.classes)
        _save(pretrain.pretrain_segformer(tiles, classes, steps), self.at(SEGFORMER))

    @functools.cached_property
    def pairs(self) -> PairArrays:
        """Pairs of `worlds` worlds."""
        return render_places(self.config.worlds, self.config.seed)

    @functools.cached_property
    def small(self) -> Tensor:
        """Tiles of the pairs, at the size that the VAE and CLIP see."""
        tiles = _planes(self.pairs.aerial).float()
        return F.avg_pool2d(tiles, SIZES.aerial // untrained.TILE).round().byte()

    @functools.cached_property
    def shares(self) -> Tensor:
        """Shares of classes around the cameras of the pairs."""
        return pretrain.class_shares(torch.from_numpy(self.pairs.classes))

    @functools.cached_property
    def tiles(self) -> tuple[Tensor, Tensor]:
        """Tiles of `tile_worlds` worlds, as planes of bytes, and their class ids."""
        aerial, classes = render_tile_arrays(
            self.config.tile_worlds, self.config.seed, untrained.TILE
        )
        return _planes(aerial).to(self.device), torch.from_numpy(classes).to(self.device)

    def begun(self, part: str, model: M) -> M:
        """The part of the diffusion model, with the weights of `start` if that is given."""
        if self.config.start:
            at = os.path.join(self.config.start, os.path.relpath(DIFFUSION, MODELS), part)
            model.load_state_dict(load_file(os.path.join(at, _WEIGHTS)))
        return model

    def part(self, name: str) -> str:
        """Where a part of the diffusion model is written."""
        return os.path.join(self.at(DIFFUSION), name)

    def at(self, model: str) -> str:
        """Where a model of the package is written."""
        return os.path.join(self.config.output, os.path.relpath(model, MODELS))


def main(config: Pretrain) -> None:
    """Train the models one after the other."""
    maker = ModelMaker(config, hardware.device())
    for name in config.models:
        torch.manual_seed(config.seed)
        log.info("%s: pre-training", name)
        getattr(maker, name)(round(STEPS[name] * config.effort))


def _save(model: nn.Module, directory: str) -> None:
    """Half precision halves the package; loading brings it back to single."""
    model.half().save_pretrained(directory, safe_serialization=True)  # pyright: ignore


def _planes(
    pictures: UInt8[np.ndarray, "row height width 3"],
) -> UInt8[Tensor, "row 3 height width"]:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main(parse(Pretrain))
