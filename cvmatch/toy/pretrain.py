"""Pre-train the toy base models: each function gives one model, from pictures in memory.

The pretext tasks stand in for the public ones: reconstruction (VAE), denoising without condition
(UNet), attributes of a picture instead of its caption (CLIP), six-class maps instead of ADE20K
(SegFormer), shares of classes by direction instead of ImageNet's labels (tower). None of them
matches a panorama with a tile.
"""

import logging
from collections.abc import Callable, Iterable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from cvmatch import geometry, metrics
from cvmatch.schema import LABELS
from cvmatch.towers import Tower, TowerSpec, normalise
from cvmatch.toy.untrained import TILE, noise_schedule

log = logging.getLogger(__name__)

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
            geometry.polar(aerial[rows].float() / 255, *panorama.shape[-2:]),  # pyright: ignore
            panorama[rows].float() / 255,
        )
        total = torch.zeros(())
        for view, head in zip(views, heads, strict=True):
            found = tower.net.features(normalise(_tinted(view)))  # pyright: ignore
            columns = F.adaptive_avg_pool2d(found, (1, SECTORS))[:, :, 0]
            total = total + _soft_entropy(head(columns).transpose(1, 2), target[rows])
        return total

    _optimise([*tower.parameters(), *heads.parameters()], loss, len(aerial), steps, 16, 1e-3)
    return tower


def pretrain_vae(
    vae: AutoencoderKL,
    aerial: UInt8[Tensor, "tile 3 64 64"],
    classes: UInt8[Tensor, "tile 64 64"],
    features: nn.Module,
    steps: int,
) -> None:
    """Train for absolute, squared and perceptual (`features`) error, five times on buildings.

    A roof is five pixels wide, and the median of a red roof in a green garden, which an absolute
    error alone draws, is green.
    """
    vae.to(aerial.device)  # pyright: ignore
    shallow = nn.Sequential(*list(features.children())[:7]).requires_grad_(False).to(aerial.device)
    both = torch.cat([aerial, classes[:, None]], dim=1)
    building = LABELS.index("building")

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        turned = _turned(both[rows])
        image, weight = turned[:, :3].float() / 127.5 - 1, 1 + 4 * (turned[:, 3:] == building)
        latent = vae.encode(image).latent_dist  # pyright: ignore
        again = vae.decode(latent.sample()).sample  # pyright: ignore
        seen, wanted = (shallow(normalise(x / 2 + 0.5)) for x in (again, image))
        perceptual = F.l1_loss(seen, wanted) / wanted.abs().mean()
        apart = (again - image).abs()
        pixels = (weight * (apart + apart.square())).sum() / (3 * weight.sum())
        # 1e-5 keeps 2,100 nats of a tile, 3e-5 1,500 and no less of the picture, 1.5e-4 470 and
        # no roofs.
        return pixels + 0.2 * perceptual + 3e-5 * latent.kl().mean()

    average = _Average(vae, 0.998)
    _optimise(
        vae.parameters(), loss, len(aerial), steps, 128, 1.5e-3, average.update, bfloat16=True
    )
    average.copy_to(vae)
    latents = encode(vae, aerial[:512])
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())


@torch.inference_mode()
def encode(
    vae: AutoencoderKL, aerial: UInt8[Tensor, "tile 3 64 64"]
) -> Float[Tensor, "tile channel 16 16"]:
    """Latent means, not scaled, in half precision."""
    parts = [
        vae.encode(part.float() / 127.5 - 1).latent_dist.mode().half()  # pyright: ignore
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
    average = _Average(unet, 0.999)

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        clean = latents[rows].float() * scaling_factor
        noise = torch.randn_like(clean)
        step = _noise_steps(len(rows)).to(rows.device)
        target = scheduler.get_velocity(clean, noise, step)  # pyright: ignore
        noisy = scheduler.add_noise(clean, noise, step)  # pyright: ignore
        tokens = clean.new_zeros(len(rows), 4, unet.config["cross_attention_dim"])
        return F.mse_loss(unet(noisy, step, tokens).sample.float(), target)

    _optimise(
        unet.parameters(), loss, len(latents), steps, 512, 1.5e-3, average.update, bfloat16=True
    )
    average.copy_to(unet)


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
    crops = geometry.azimuth_crops(panorama, CROPS)
    half = SECTORS // CROPS // 2
    by_crop = torch.roll(shares, half, dims=2).unflatten(2, (CROPS, -1)).mean(dim=3)

    def loss(rows: Int64[Tensor, " batch"]) -> Tensor:
        crop = int(torch.randint(CROPS, ()))
        pictures = torch.cat([_turned(aerial[rows]), crops[rows, crop]]).float() / 255
        told = head(clip(normalise(_tinted(pictures))).pooler_output)
        target = torch.cat([shares[rows].mean(dim=2), by_crop[rows, :, crop]])
        return _soft_entropy(told.unflatten(1, (RINGS, -1)), target)

    _optimise([*clip.parameters(), *head.parameters()], loss, len(aerial), steps, 32, 1e-3)
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
        turned = _turned(both)
        logits = model(normalise(_tinted(turned[:, :3].float() / 255))).logits
        whole = F.interpolate(logits, turned.shape[-2:], mode="bilinear")
        return F.cross_entropy(whole, turned[:, 3].long())

    _optimise(model.parameters(), loss, len(aerial), steps, 16, 1e-3)
    return model


def class_shares(
    classes: UInt8[Tensor, "pair 128 128"],
) -> Float[Tensor, "pair rings sectors label"]:
    """Shares of the classes by distance (far first) and direction (from south, clockwise)."""
    parts = []
    for part in classes.split(64):
        view = geometry.polar(part[:, None].float(), 2 * RINGS * 8, 4 * SECTORS, "nearest")[:, 0]
        one_hot = F.one_hot(view.long(), len(LABELS)).permute(0, 3, 1, 2).float()
        parts.append(F.adaptive_avg_pool2d(one_hot, (RINGS, SECTORS)).permute(0, 2, 3, 1))
    return torch.cat(parts)


class _Average:
    """Running mean of a model's weights, which samples better than the last ones."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.mean = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        now = list(self.model.state_dict().values())
        torch._foreach_lerp_(list(self.mean.values()), now, 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict(self.mean)


def _optimise(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    rows: int,
    steps: int,
    batch: int,
    rate: float,
    after: Callable[[int], None] = lambda step: None,
    bfloat16: bool = False,
) -> None:
    """AdamW with a warm-up of 5 % of the steps and a cosine down to zero."""
    weights = list(parameters)
    at = weights[0].device
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    recent = torch.zeros((), device=at)
    for step in range(steps):
        with torch.autocast(at.type, torch.bfloat16, enabled=bfloat16):
            value = loss(torch.randint(rows, (batch,), device=at))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        plan.step()
        after(step)
        recent += (value.detach() - recent) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            log.info("step %d of %d, loss %.4f", step + 1, steps, recent.item())


def _noise_steps(rows: int) -> Int64[Tensor, " row"]:
    """Steps of the schedule, from 0 to 999: half from all, half (logit-normal) from the middle.

    There shapes are decided; nearly nothing can be learned above 750 (loss 0.91 of 1).
    """
    middle = 1000 * torch.sigmoid(0.8 * torch.randn(rows) - 0.4)
    return torch.where(torch.rand(rows) < 0.5, 1000 * torch.rand(rows), middle).long()


def _turned(
    tile: UInt8[Tensor, "batch channel size size"],
) -> UInt8[Tensor, "batch channel size size"]:
    turned = torch.rot90(tile, int(torch.randint(4, ())), (-2, -1))
    return turned.flip(-1) if torch.rand(()) < 0.5 else turned


def _tinted(image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Gain and tint of each picture drawn anew (sigma 15 and 5 %): colour is no shortcut."""
    gain = 1 + 0.15 * torch.randn(len(image), 1, 1, 1) + 0.05 * torch.randn(len(image), 3, 1, 1)
    return (image * gain).clamp(0, 1)


def _soft_entropy(
    logits: Float[Tensor, "*batch label"], target: Float[Tensor, "*batch label"]
) -> Tensor:
    return -(target * logits.log_softmax(-1)).sum(-1).mean()
