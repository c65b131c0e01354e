"""Pre-train the toy tower, CLIP and SegFormer, each from pictures in memory.

The pretext tasks stand in for the public ones: attributes of a picture instead of its caption
(CLIP), six-class maps instead of ADE20K (SegFormer), shares of classes by direction instead of
ImageNet's labels (tower). None of them matches a panorama with a tile.
"""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from cvmatch.data.schema import LABELS
from cvmatch.nn import geometry
from cvmatch.nn.backbones import Tower, TowerSpec, normalise
from tools.demo_models.optimise import optimise, rotate_at_random
from tools.demo_models.untrained import TILE

SECTORS = 32
"""Directions in which the tower tells shares of classes."""

RINGS = 3
"""Distances, from the camera to the tile's edge, in which CLIP tells them."""

CROPS = 4
"""Square windows that cover a toy panorama exactly."""


def pretrain_tower(
    aerial: UInt8[Tensor, "pair 3 height width"],
    panorama: UInt8[Tensor, "pair 3 rows columns"],
    shares: Float[Tensor, "pair rings sectors label"],
    steps: int,
) -> Tower:
    """A VGG-type tower that tells the shares of classes by direction, in both views."""
    spec = TowerSpec(arch="vgg", layers=(24, "M", 48, "M", 64, "M", 96), grid=(2, 16), dim=128)
    tower = Tower(spec)
    heads = nn.ModuleList(nn.Conv1d(96, len(LABELS), 1) for _ in range(2))
    target = shares.mean(dim=1)

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        views = (
            geometry.to_polar(aerial[rows].float() / 255, *panorama.shape[-2:]),  # pyright: ignore
            panorama[rows].float() / 255,
        )
        total = torch.zeros(())
        for view, head in zip(views, heads, strict=True):
            found = tower.net.features(normalise(_tinted(view)))  # pyright: ignore
            columns = F.adaptive_avg_pool2d(found, (1, SECTORS))[:, :, 0]
            total = total + _soft_entropy(head(columns).transpose(1, 2), target[rows])
        return total

    optimise(nn.ModuleList([tower, heads]), loss, len(aerial), steps, batch=16, rate=1e-3)
    return tower


def pretrain_clip(
    aerial: UInt8[Tensor, "pair 3 64 64"],
    panorama: UInt8[Tensor, "pair 3 64 256"],
    shares: Float[Tensor, "pair rings sectors label"],
    steps: int,
) -> CLIPVisionModel:
    """A CLIP vision tower that tells attributes (shares of classes by distance) of both views."""
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=8,
    )
    clip = CLIPVisionModel(config)
    head = nn.Linear(96, RINGS * len(LABELS))
    crops = geometry.crop_azimuths(panorama, CROPS)
    half = SECTORS // CROPS // 2
    by_crop = torch.roll(shares, half, dims=2).unflatten(2, (CROPS, -1)).mean(dim=3)

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        crop = int(torch.randint(CROPS, ()))
        pictures = torch.cat([rotate_at_random(aerial[rows]), crops[rows, crop]]).float() / 255
        told = head(clip(normalise(_tinted(pictures))).pooler_output)
        target = torch.cat([shares[rows].mean(dim=2), by_crop[rows, :, crop]])
        return _soft_entropy(told.unflatten(1, (RINGS, -1)), target)

    optimise(nn.ModuleList([clip, head]), loss, len(aerial), steps, batch=32, rate=1e-3)
    return clip


def pretrain_segformer(
    aerial: UInt8[Tensor, "pair 3 128 128"], classes: UInt8[Tensor, "pair 128 128"], steps: int
) -> SegformerForSemanticSegmentation:
    """A small SegFormer of six classes."""
    config = SegformerConfig(
        num_labels=len(LABELS),  # pyright: ignore
        depths=[2, 2, 2, 2],
        hidden_sizes=[16, 32, 64, 128],
        num_attention_heads=[1, 1, 2, 4],
        decoder_hidden_size=64,
        classifier_dropout_prob=0.0,
    )
    model = SegformerForSemanticSegmentation(config)

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        both = torch.cat([aerial[rows], classes[rows][:, None]], dim=1)
        shown = rotate_at_random(both)
        logits = model(normalise(_tinted(shown[:, :3].float() / 255))).logits
        whole = F.interpolate(logits, shown.shape[-2:], mode="bilinear")
        return F.cross_entropy(whole, shown[:, 3].long())

    optimise(model, loss, len(aerial), steps, batch=16, rate=1e-3)
    return model


def class_shares(
    classes: UInt8[Tensor, "pair 128 128"],
) -> Float[Tensor, "pair rings sectors label"]:
    """Shares of the classes by distance (far first) and direction (from south, clockwise)."""
    parts = []
    for part in classes.split(64):
        view = geometry.to_polar(part[:, None].float(), 2 * RINGS * 8, 4 * SECTORS, "nearest")[:, 0]
        one_hot = F.one_hot(view.long(), len(LABELS)).permute(0, 3, 1, 2).float()
        parts.append(F.adaptive_avg_pool2d(one_hot, (RINGS, SECTORS)).permute(0, 2, 3, 1))
    return torch.cat(parts)


def _tinted(image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Gain and tint of each picture drawn anew (sigma 15 and 5 %): colour is no shortcut."""
    gain = 1 + 0.15 * torch.randn(len(image), 1, 1, 1) + 0.05 * torch.randn(len(image), 3, 1, 1)
    return (image * gain).clamp(0, 1)


def _soft_entropy(
    logits: Float[Tensor, "*batch label"], target: Float[Tensor, "*batch label"]
) -> Tensor:
    return -(target * logits.log_softmax(-1)).sum(-1).mean()
