"""Rows with A, C, S(A) and the true map -> how faithful generator and segmenter are.

Always against shuffled rows too: a model that ignores its input scores the same for both.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cvmatch.data import images, schema
from cvmatch.evaluate.results import (
    GenerationResult,
    PictureRetrieval,
    Recall,
    SegmentationResult,
)
from cvmatch.nn import metrics


@runtime_checkable
class PictureDistance(Protocol):
    """A distance of two sets of pictures, such as torchmetrics' FID."""

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add pictures (uint8) to one of the sets."""
        ...

    def compute(self) -> Tensor:
        """Return the distance."""
        ...


_log = logging.getLogger(__name__)

CHANNELS: tuple[metrics.Channel, ...] = ("luminance", "chroma", "gradient")
"""By what true tiles are retrieved."""

SIMILARITIES = (metrics.psnr, metrics.ssim, metrics.ncc)
"""How similar a picture is to another of its size."""

_CHUNK = 1024  # pictures a side of one block of correlations


def measure_generation(
    rows: Iterable[Mapping[str, Any]],
    bootstrap: int = 1000,
    seed: int = 0,
    fid: PictureDistance | None = None,
) -> GenerationResult | None:
    """Measure how well A (`synthetic`) shows its tile C (`aerial`), against the row before's tile.

    PSNR in dB, SSIM and luminance correlation (NCC) at A's size; and recall of C among all tiles by
    the NCC with A at 16 x 16, no model in between, also by chroma and by gradient, which no term of
    the training looks at.

    Args:
        rows: with encoded pictures; those that lack one of the two are skipped.
        bootstrap: resamples for each interval.
        seed: of the resamples.
        fid: updated with all A and all C; see `fid.build_fid`.

    Returns:
        None where no row has both pictures.
    """
    values: dict[str, list[Tensor]] = {}
    planes: dict[metrics.Channel, list[Tensor]] = {channel: [] for channel in CHANNELS}
    before = None
    for row in rows:
        if not (row[schema.SYNTHETIC] and row[schema.AERIAL]):
            continue
        generated, true = _decode_pair(row)
        if fid is not None:
            for real, pixels in enumerate((generated, true)):
                fid.update((pixels * 255).round().byte(), real=bool(real))
        for channel, parts in planes.items():
            parts.append(metrics.planes(torch.cat([generated, true]), channel))
        _add_similarities(generated, {"": true, "_shuffled": before}, values)
        before = true
    if before is None:
        return None
    retrieval = {}
    for channel, parts in planes.items():
        predicted, true = torch.stack(parts).unbind(1)
        retrieval[channel] = retrieve_by_ncc(predicted, true, bootstrap, seed)
    return GenerationResult(
        similarity={name: torch.cat(parts).mean().item() for name, parts in values.items()},
        retrieval=retrieval,
        fid=None if fid is None else fid.compute().item(),
    )


def measure_segmentation(
    rows: Iterable[Mapping[str, Any]],
    num_classes: int = 5,
    column: str = schema.SYNTHETIC_CLASSES,
) -> SegmentationResult | None:
    """Measure how predicted ids agree with the true map (`classes`) at its own resolution.

    Args:
        rows: with encoded maps; those that lack one of the two are skipped.
        num_classes: 5, or 6 with cars.
        column: of the predicted ids: S(A); for true aerials pass rows that a segmenter filled from
            `aerial`.

    Returns:
        None where no row has both maps.
    """
    total = shuffled = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    pixels, before = 0, None
    for row in rows:
        if not (row[column] and row[schema.CLASSES]):
            continue
        truth = images.decode_palette(row[schema.CLASSES], num_classes=num_classes)
        ids = torch.from_numpy(images.decode_ids(row[column], truth.shape).copy())
        true = torch.from_numpy(truth)
        total = total + metrics.confusion(ids, true, num_classes)
        if before is not None and before.shape == ids.shape:
            shuffled = shuffled + metrics.confusion(ids, before, num_classes)
        pixels, before = pixels + true.numel(), true
    if not pixels:
        return None
    mean, per_class = metrics.miou(total)
    if not total.sum():
        _log.warning("no pixel of the true class maps has a class: mIoU is not known.")
    return SegmentationResult(
        miou=mean,
        miou_shuffled=metrics.miou(shuffled)[0],
        accuracy=(total.diagonal().sum() / total.sum()).item(),
        ignored=1 - total.sum().item() / pixels,
        iou=dict(zip(schema.LABELS, per_class, strict=False)),
        confusion=total.tolist(),
    )


def retrieve_by_ncc(
    predicted: Float[Tensor, "row plane h w"],
    true: Float[Tensor, "row plane h w"],
    bootstrap: int = 1000,
    seed: int = 0,
) -> PictureRetrieval:
    """Measure recall@1, @1 % and @10 % of each true picture among all, with intervals.

    Args:
        predicted: `metrics.planes` of predicted pictures.
        true: those of the true ones, in the same order.
        bootstrap: resamples for each interval.
        seed: of the resamples.
    """
    return summarize_ranks(rank_by_ncc(predicted, true), bootstrap, seed)


def summarize_ranks(
    rank: Int64[Tensor, " row"], bootstrap: int = 1000, seed: int = 0
) -> PictureRetrieval:
    """Return the recalls of `retrieve_by_ncc` from the ranks of all true pictures."""
    recalls = {}
    for name, share in (("recall@1", 1e-9), ("recall@1%", 0.01), ("recall@10%", 0.1)):
        value, k = metrics.recall_share(share, rank, len(rank))
        low, high = metrics.bootstrap((rank < k).float(), bootstrap, seed)
        recalls[name] = Recall(value=value, low=low, high=high, k=float(k))
    return PictureRetrieval(gallery=float(len(rank)), recalls=recalls)


def rank_by_ncc(
    predicted: Float[Tensor, "row plane h w"], true: Float[Tensor, "row plane h w"]
) -> Int64[Tensor, " row"]:
    """Rank, zero-based, each true picture among all, of `metrics.planes` in the same order."""
    ranks = []
    for begin in range(0, len(true), _CHUNK):
        part = predicted[begin : begin + _CHUNK]
        blocks = [metrics.retrieval_by_ncc(part, other) for other in true.split(_CHUNK)]
        truth = torch.arange(begin, begin + len(part))
        ranks.append(metrics.ranks(torch.cat(blocks, dim=1), truth))
    return torch.cat(ranks)


def _add_similarities(
    picture: Tensor, others: Mapping[str, Tensor | None], values: dict[str, list[Tensor]]
) -> None:
    """Add the similarity of a picture with each of the others to `values`."""
    for suffix, other in others.items():
        if other is not None and other.shape == picture.shape:
            for metric in SIMILARITIES:
                values.setdefault(metric.__name__ + suffix, []).append(metric(picture, other))


def _decode_pair(
    row: Mapping[str, Any],
) -> tuple[Float[Tensor, "1 3 h w"], Float[Tensor, "1 3 h w"]]:
    """Return A and C, both at the size of A."""
    size = images.decode(row[schema.SYNTHETIC]).shape[:2]
    return _decode(row[schema.SYNTHETIC], size), _decode(row[schema.AERIAL], size)


def _decode(data: bytes, size: tuple[int, ...]) -> Float[Tensor, "1 3 h w"]:
    pixels = torch.from_numpy(images.decode(data, (size[0], size[1])).copy())
    return pixels.permute(2, 0, 1)[None].float() / 255
