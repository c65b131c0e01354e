"""The segmenter's training step: tiles and class maps -> losses and counts."""

import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cvmatch.data import schema
from cvmatch.nn import geometry, metrics, rng
from cvmatch.segment.model import Segmenter, upsample
from cvmatch.segment.settings import TrainSegmenter
from cvmatch.training.task import ParameterGroup

JITTER = 0.3
"""Brightness, contrast and saturation are scaled by factors in 1 +- JITTER in training."""


class SegmenterTask(nn.Module):
    """`aerial` (uint8, CHW), `aerial_mask` (ids, HW), `key` -> the loss.

    Args:
        segmenter: The network and its preprocessing.
        config: Rates, augmentation and the weight of the Dice loss.
        class_weights: Weight of each class in the cross entropy; None: 1.
    """

    def __init__(
        self, segmenter: Segmenter, config: TrainSegmenter, class_weights: list[float] | None = None
    ) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.config = config
        weights = class_weights or [1.0] * segmenter.preprocess.num_classes
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(weights))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and its terms; in eval mode also `confusion`, in counts a row."""
        tile, mask = batch["aerial"].float(), batch["aerial_mask"]
        if self.training and self.config.augment:
            stream = rng.fold_in(self.config.fit.seed, int(batch["epoch"]), "segment")
            tile, mask = augment(tile, mask, rng.uniform(batch["key"], stream, 5))
        logits = upsample(self.segmenter.logits(tile), mask.shape[-1])
        values = {"cross_entropy": cross_entropy(logits, mask, self.class_weights)}
        if self.config.dice_weight:
            values["dice"] = dice(logits, mask)
        loss = values["cross_entropy"] + self.config.dice_weight * values.get("dice", 0.0)
        values |= {"loss": loss, "ignored": (mask == schema.IGNORE).float().mean()}
        if not self.training:
            counts = metrics.confusion(logits.argmax(1), mask, len(self.class_weights))
            values["confusion"] = counts.float() / len(mask)
        return values

    def groups(self) -> list[ParameterGroup]:
        """Return the pretrained encoder and the head, each with its learning rate."""
        net = self.segmenter.net
        return [
            {"params": list(net.segformer.parameters()), "lr": self.config.lr},
            {"params": list(net.decode_head.parameters()), "lr": self.config.lr_head},
        ]

    def save(self, directory: str) -> None:
        """Write what `Segmenter.load` reads."""
        self.segmenter.save(directory)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Return scalars to log: the mean losses, mIoU and the IoU of each class that occurs."""
        mean, per_class = metrics.miou(means["confusion"])
        scalars = {name: value.item() for name, value in means.items() if not value.ndim}
        labels = zip(schema.LABELS, per_class, strict=False)  # five or six of the six labels
        classes = {f"iou/{label.replace(' ', '_')}": iou for label, iou in labels}
        return scalars | {"miou": mean} | {k: v for k, v in classes.items() if not math.isnan(v)}


def cross_entropy(
    logits: Float[Tensor, "n classes h w"], mask: UInt8[Tensor, "n h w"], weights: Tensor
) -> Float[Tensor, ""]:
    """Average over the pixels that count, by class weights; 0 where none does (torch: NaN)."""
    truth = mask.long()
    total = nn.functional.cross_entropy(
        logits, truth, weights, ignore_index=schema.IGNORE, reduction="sum"
    )
    counted = truth[truth != schema.IGNORE]
    return total / weights[counted].sum().clamp(min=1e-6)


def dice(logits: Float[Tensor, "n classes h w"], mask: UInt8[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Return the soft Dice loss (Milletari et al. 2016), in [0, 1], mean over the classes there."""
    classes = logits.shape[1]
    counted = (mask != schema.IGNORE)[:, None]
    chance = logits.softmax(1) * counted
    truth = nn.functional.one_hot(mask.long().clamp(max=classes), classes + 1)
    truth = truth[..., :classes].permute(0, 3, 1, 2)
    sizes = (chance + truth).sum((0, 2, 3))
    overlap = 2 * (chance * truth).sum((0, 2, 3)) / sizes.clamp(min=1)
    present = truth.sum((0, 2, 3)) > 0
    return ((1 - overlap) * present).sum() / present.sum().clamp(min=1)


def class_weights(masks: UInt8[np.ndarray, "n h w"], num_classes: int) -> list[float]:
    """Weigh classes by 1 / ln(1.02 + share of the pixels that count), 1.4 to 50 (ENet, 2016)."""
    counts = np.bincount(masks.reshape(-1), minlength=256)[:num_classes]
    return (1 / np.log(1.02 + counts / max(1, counts.sum()))).tolist()


def augment(
    tile: Float[Tensor, "n 3 size size"],
    mask: UInt8[Tensor, "n size size"],
    lots: Float[Tensor, "n 5"],
) -> tuple[Float[Tensor, "n 3 size size"], UInt8[Tensor, "n size size"]]:
    """Mirror and turn tile and mask alike, and jitter the tile's colours.

    Args:
        tile: Pictures with values in [0, 255].
        mask: Their class ids.
        lots: Random numbers in [0, 1): quarter turns, mirror, brightness, contrast, saturation.
    """
    mirror = lots[:, 1] < 0.5
    quarter = (lots[:, 0] * 4).long()
    # A mirror and then a turn is the opposite turn and then a mirror.
    turns = torch.where(mirror, -quarter % 4, quarter)
    tile, mask = (geometry.rotate90_tile(maps, turns, mirror) for maps in (tile, mask))
    bright, contrast, saturation = (1 + JITTER * (2 * lots[:, 2:] - 1)).T[..., None, None, None]
    color = tile * bright
    grey = color.mean(1, keepdim=True)
    color = grey + (color - grey) * saturation
    mean = color.mean((1, 2, 3), keepdim=True)
    color = mean + (color - mean) * contrast
    return color.clamp(0, 255), mask
