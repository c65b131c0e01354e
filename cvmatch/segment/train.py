"""Fine-tune SegFormer on aerial pictures and their class maps."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import ray.data
import torch
from jaxtyping import Float, UInt8
from ray.data import Dataset
from ray.train import Result
from torch import Tensor, nn

from cvmatch.data import images, manifest, schema, storage
from cvmatch.data.pairs import PairDataset
from cvmatch.nn import hub, metrics, rng
from cvmatch.runtime import tracking
from cvmatch.runtime.output_directory import read_provenance
from cvmatch.segment.batches import Preprocess, decode, decode_synthesized
from cvmatch.segment.model import Segmenter, enlarge
from cvmatch.segment.settings import TrainSegmenter
from cvmatch.training import launch
from cvmatch.training.settings import Fit

JITTER = 0.3
"""Brightness, contrast and saturation are scaled by factors in 1 +- JITTER in training."""

COUNTED = 256
"""Training rows whose pixels are counted for the class weights."""

SHOWN = 6
"""Pictures on the sheet of masks that a run logs."""


class SegmenterTask(nn.Module):
    """Loss of a batch: `tile` uint8 (row, 3, size, size), `mask` uint8 (row, size, size), `key`."""

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
        """Loss and its parts; in eval mode also `confusion`, in counts a row of the batch."""
        tile, mask = batch["tile"].float(), batch["mask"]
        if self.training and self.config.augment:
            stream = rng.fold_in(self.config.fit.seed, int(batch["epoch"]), "segment")
            tile, mask = augment(tile, mask, rng.uniform(batch["key"], stream, 5))
        logits = enlarge(self.segmenter.logits(tile), mask.shape[-1])
        parts = {"cross_entropy": cross_entropy(logits, mask, self.class_weights)}
        if self.config.dice:
            parts["dice"] = dice(logits, mask)
        loss = parts["cross_entropy"] + self.config.dice * parts.get("dice", 0.0)
        parts |= {"loss": loss, "ignored": (mask == schema.IGNORE).float().mean()}
        if not self.training:
            counts = metrics.confusion(logits.argmax(1), mask, len(self.class_weights))
            parts["confusion"] = counts.float() / len(mask)
        return parts

    def groups(self) -> list[dict]:
        """The pretrained encoder and the head, each with its learning rate."""
        net = self.segmenter.net
        return [
            {"params": list(net.segformer.parameters()), "lr": self.config.lr},
            {"params": list(net.decode_head.parameters()), "lr": self.config.lr_head},
        ]

    def save(self, directory: str) -> None:
        """Write what `Segmenter.load` reads."""
        self.segmenter.save(directory)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Scalars to log: the mean losses, mIoU and the IoU of each class that occurs."""
        mean, per_class = metrics.miou(means["confusion"])
        scalars = {name: value.item() for name, value in means.items() if not value.ndim}
        found = zip(schema.LABELS, per_class, strict=False)  # five or six of the six labels
        classes = {f"iou/{label.replace(' ', '_')}": iou for label, iou in found}
        return scalars | {"miou": mean} | {k: v for k, v in classes.items() if not math.isnan(v)}


def train(config: TrainSegmenter) -> Result:
    """Train on the rows of `config.data` and publish the model at `config.output`.

    Raises:
        FileNotFoundError: no finished output of jobs/synthesize.py at `config.synthesized`.
        ValueError: no row has a class map, the synthesized rows are of another split, or the base
            model cannot be had.
    """
    launch.preflight(config.fit)
    preprocess = Preprocess(size=config.size, num_classes=config.num_classes)
    pairs = PairDataset.open(config.data)
    held_out = config.held_out and PairDataset.open(config.held_out)
    rows = training_rows(config, pairs, preprocess)
    val = held_out and labelled(held_out, preprocess, config.fit)
    weights = None
    if config.class_weights:
        masks = [row["mask"] for row in rows.select_columns("mask").take(COUNTED)]
        weights = class_weights(np.stack(masks), config.num_classes)
    build = functools.partial(
        _build, config, hub.absolute_or_hub_id(config.base), preprocess, weights
    )
    with tracking.start("segment", config) as run:
        rows_of = _input_fingerprint(config, [pairs, *([held_out] if held_out else [])])
        result = launch.fit(build, rows, val, config.fit, run, made_from=rows_of)
        launch.publish(result, config.output)
        run.image("masks", sheet(Segmenter.load(config.output), (val or rows).take(SHOWN)))
    return result


def labelled(pairs: PairDataset, preprocess: Preprocess, fit: Fit) -> Dataset:
    """Decoded rows with a class map: `tile`, `mask` and `key`.

    Raises:
        ValueError: there is none.
    """
    decoded = launch.cached(_mapped(pairs.rows(), decode, preprocess=preprocess), fit)
    if not decoded.take(1):
        data = pairs.config
        raise ValueError(
            f"{data.root} ({data.split}): expected rows with a class map, got none. The segmenter "
            "learns from segmap/*.png; official CVUSA has none, the published subset has."
        )
    return decoded


def training_rows(config: TrainSegmenter, pairs: PairDataset, preprocess: Preprocess) -> Dataset:
    """Labelled rows of `config.data`, and between them those of `config.synthesized`.

    Raises:
        FileNotFoundError: no finished output of jobs/synthesize.py at `config.synthesized`.
        ValueError: it is of another split, or no row of `config.data` has a class map.
    """
    if not config.synthesized:
        return labelled(pairs, preprocess, config.fit)
    made = manifest.read(config.synthesized)["config"]
    split = made.get("data", {}).get("split")
    if split != config.data.split:
        raise ValueError(
            f"{config.synthesized}: expected rows of the split {config.data.split!r} that is "
            f"trained on, got {split!r}. Pass the output of jobs/synthesize.py for that split."
        )
    filesystem, path = storage.resolve(config.synthesized)
    columns = [schema.PAIR_ID, schema.SYNTHETIC, schema.CLASSES, schema.ERROR]
    drawn = ray.data.read_parquet(path, filesystem=filesystem, columns=columns)
    share = config.synthesized_share
    options = {"preprocess": preprocess, "share": share, "seed": config.fit.seed}
    drawn = _mapped(drawn, decode_synthesized, **options)
    true = labelled(pairs, preprocess, config.fit)
    # mix and not union, which would put them all at the end of an epoch.
    return launch.cached(true.mix(drawn, weights=[1.0, share]), config.fit)


def class_weights(masks: UInt8[np.ndarray, "n h w"], num_classes: int) -> list[float]:
    """1 / ln(1.02 + share of the pixels that count) by class, from 1.4 to 50 (ENet, 2016)."""
    counts = np.bincount(masks.reshape(-1), minlength=256)[:num_classes]
    return (1 / np.log(1.02 + counts / max(1, counts.sum()))).tolist()


def cross_entropy(
    logits: Float[Tensor, "n classes h w"], mask: UInt8[Tensor, "n h w"], weights: Tensor
) -> Float[Tensor, ""]:
    """Mean over the pixels that count, weighted by their class; 0 where none does (torch: NaN)."""
    truth = mask.long()
    total = nn.functional.cross_entropy(
        logits, truth, weights, ignore_index=schema.IGNORE, reduction="sum"
    )
    counted = truth[truth != schema.IGNORE]
    return total / weights[counted].sum().clamp(min=1e-6)


def dice(logits: Float[Tensor, "n classes h w"], mask: UInt8[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Soft Dice loss (Milletari et al. 2016), in [0, 1], mean over the classes of the batch."""
    classes = logits.shape[1]
    counted = (mask != schema.IGNORE)[:, None]
    chance = logits.softmax(1) * counted
    truth = nn.functional.one_hot(mask.long().clamp(max=classes), classes + 1)
    truth = truth[..., :classes].permute(0, 3, 1, 2)
    sizes = (chance + truth).sum((0, 2, 3))
    overlap = 2 * (chance * truth).sum((0, 2, 3)) / sizes.clamp(min=1)
    present = truth.sum((0, 2, 3)) > 0
    return ((1 - overlap) * present).sum() / present.sum().clamp(min=1)


def augment(
    tile: Float[Tensor, "n 3 size size"],
    mask: UInt8[Tensor, "n size size"],
    lots: Float[Tensor, "n 5"],
) -> tuple[Float[Tensor, "n 3 size size"], UInt8[Tensor, "n size size"]]:
    """Turn and mirror tile and mask alike, and jitter the tile's colours, by draws from [0, 1).

    Of the five lots: quarter turns, mirror, brightness, contrast, saturation.
    """
    quarter, flipped = (lots[:, 0] * 4).long(), lots[:, 1] < 0.5
    both = torch.cat([tile, mask[:, None].to(tile)], dim=1)
    both = torch.where(flipped[:, None, None, None], both.flip(-1), both)
    turned = torch.stack([torch.rot90(both, turns, (-2, -1)) for turns in range(4)])
    both = turned[quarter, torch.arange(len(tile), device=tile.device)]
    bright, contrast, saturation = (1 + JITTER * (2 * lots[:, 2:] - 1)).T[..., None, None, None]
    colour = both[:, :3] * bright
    grey = colour.mean(1, keepdim=True)
    colour = grey + (colour - grey) * saturation
    level = colour.mean((1, 2, 3), keepdim=True)
    colour = level + (colour - level) * contrast
    return colour.clamp(0, 255), both[:, 3].byte()


def sheet(segmenter: Segmenter, rows: list[dict]) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures of rows, one above the other: tile, true classes, predicted classes."""
    tiles = np.stack([row["tile"] for row in rows])
    predicted = segmenter.predict(torch.from_numpy(tiles)).numpy()
    strips = [
        np.hstack([tile.transpose(1, 2, 0), *map(images.colours_of, (row["mask"], ids))])
        for tile, row, ids in zip(tiles, rows, predicted, strict=True)
    ]
    return np.vstack(strips)


def _mapped(rows: Dataset, step: Callable, **arguments: Any) -> Dataset:
    """`step` on whole blocks."""
    return rows.map_batches(step, fn_kwargs=arguments, batch_format="numpy", batch_size=None)


def _input_fingerprint(config: TrainSegmenter, pairs: list[PairDataset]) -> str:
    """Hash the data, and what the synthetic aerials were made from."""
    synthesized = config.synthesized and read_provenance(config.synthesized)
    return manifest.digest([[one.fingerprint for one in pairs], synthesized])


def _build(
    config: TrainSegmenter, base: str, preprocess: Preprocess, weights: list[float] | None
) -> SegmenterTask:
    return SegmenterTask(Segmenter.from_base(base, preprocess), config, weights)
