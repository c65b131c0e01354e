"""Make the toy base models: `python -m cvmatch.toy` (about two hours on two cores)."""

import logging
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from cvmatch import towers
from cvmatch.config import parse
from cvmatch.toy import CLIP, DIFFUSION, MODELS, SEGFORMER, TOWER, pretrain
from cvmatch.toy.places import Places, places

Name = Literal["tower", "vae", "unet", "clip", "segformer"]

STEPS: dict[Name, int] = {"tower": 400, "vae": 2500, "unet": 8000, "clip": 500, "segformer": 500}
"""Optimizer steps of the models in the package. (Its VAE had 1,000 of them with four channels.)"""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-train the toy base models on worlds that no data set contains."""

    models: tuple[Name, ...] = get_args(Name)
    """Which; in this order, since the VAE needs the tower and the UNet needs the VAE."""
    worlds: int = 160
    """Worlds to train on, of 24 pairs each."""
    effort: float = 1.0
    """Factor on the number of optimizer steps."""
    output: str = MODELS
    """Local directory of the models."""
    seed: int = 0
    """Seed of the worlds, the weights and the batches."""


def main(config: Pretrain) -> None:
    """Train the models one after the other and save each as soon as it is done."""
    found = places(config.worlds, config.seed)
    for name in config.models:
        torch.manual_seed(config.seed)
        logging.info("%s: pre-training", name)
        _MAKE[name](found, config.output, round(STEPS[name] * config.effort))


def _tower(found: Places, output: str, steps: int) -> None:
    tiles, panoramas = _channels_first(found.aerial), _channels_first(found.panorama)
    tower = pretrain.pretrain_tower(tiles, panoramas, _shares(found), steps)
    towers.save_tower(tower.half(), _at(output, TOWER))


def _vae(found: Places, output: str, steps: int) -> None:
    stack = towers.features(_at(output, TOWER)).float()
    vae = pretrain.pretrain_vae(_small(found), stack, steps)
    _save(vae, os.path.join(_at(output, DIFFUSION), "vae"))


def _unet(found: Places, output: str, steps: int) -> None:
    vae = AutoencoderKL.from_pretrained(_at(output, DIFFUSION), subfolder="vae")
    tiles = _small(found)
    turned = [torch.rot90(tiles, turns, (-2, -1)) for turns in range(4)]
    latents = torch.cat([pretrain.encode(vae, part) for part in turned])
    scaling_factor = vae.config["scaling_factor"]
    unet, scheduler = pretrain.pretrain_unet(latents, scaling_factor, steps)
    _save(unet, os.path.join(_at(output, DIFFUSION), "unet"))
    scheduler.save_pretrained(os.path.join(_at(output, DIFFUSION), "scheduler"))


def _clip(found: Places, output: str, steps: int) -> None:
    panoramas = _channels_first(found.panorama)
    clip = pretrain.pretrain_clip(_small(found), panoramas, _shares(found), steps)
    _save(clip, _at(output, CLIP))
    side = pretrain.TILE
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=towers.MEAN,
        image_std=towers.STD,
    )
    processor.save_pretrained(_at(output, CLIP))


def _segformer(found: Places, output: str, steps: int) -> None:
    tiles, classes = _channels_first(found.aerial), torch.from_numpy(found.classes)
    _save(pretrain.pretrain_segformer(tiles, classes, steps), _at(output, SEGFORMER))


_MAKE = {
    "tower": _tower,
    "vae": _vae,
    "unet": _unet,
    "clip": _clip,
    "segformer": _segformer,
}


def _at(output: str, model: str) -> str:
    return os.path.join(output, os.path.relpath(model, MODELS))


def _save(model: nn.Module, directory: str) -> None:
    """Half precision halves the package; loading brings it back to single."""
    model.half().save_pretrained(directory, safe_serialization=True)  # pyright: ignore


def _channels_first(pictures) -> Tensor:  # noqa: ANN001
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _small(found: Places) -> Tensor:
    tiles = _channels_first(found.aerial).float()
    return F.avg_pool2d(tiles, tiles.shape[-1] // pretrain.TILE).round().byte()


def _shares(found: Places) -> Tensor:
    return pretrain.class_shares(torch.from_numpy(found.classes))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main(parse(Pretrain))
