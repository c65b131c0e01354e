"""Rows with A, C, S(A) and the true map -> how faithful generator and segmenter are.

Always against shuffled rows too: a dead condition scores the same for both.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cvmatch.data import images, schema
from cvmatch.nn import metrics


@runtime_checkable
class Distance(Protocol):
    """A distance of two sets of pictures, such as torchmetrics' FID."""

    def update(self, imgs: Tensor, real: bool) -> None:
        """Count pictures (uint8) of one of the sets."""
        ...

    def compute(self) -> Tensor:
        """The distance."""
        ...


VIEWS: tuple[metrics.View, ...] = ("luminance", "chroma", "gradient")
"""What true tiles are found by."""

MEASURES = (metrics.psnr, metrics.ssim, metrics.ncc)
"""How near a picture comes to another of its size."""

_CHUNK = 1024  # pictures a side of one block of correlations


def generation(
    rows: Iterable[Mapping[str, Any]],
    bootstrap: int = 1000,
    seed: int = 0,
    distance: Distance | None = None,
) -> dict[str, float]:
    """How well A (`synthetic`) shows its tile C (`aerial`), against the tile of the row before.

    PSNR in dB, SSIM and luminance correlation (NCC) at A's size; and recall of C among all tiles by
    the NCC with A at 16 x 16, no model in between, also by chroma and by gradient, which no term of
    the training looks at (`chroma/recall@1`). With `distance` (`frechet.distance`) also `fid`, of
    all A from all C. Empty where no row has both pictures.
    """
    values: dict[str, list[Tensor]] = {}
    seen: dict[metrics.View, list[Tensor]] = {view: [] for view in VIEWS}
    before = None
    for row in rows:
        if not (row[schema.SYNTHETIC] and row[schema.AERIAL]):
            continue
        drawn = images.decode(row[schema.SYNTHETIC])
        pair = [_planes(row[name], drawn.shape[:2]) for name in (schema.SYNTHETIC, schema.AERIAL)]
        if distance is not None:
            for true, pixels in enumerate(pair):
                distance.update((pixels * 255).round().byte(), real=bool(true))
        for view, some in seen.items():
            some.append(metrics.planes(torch.cat(pair), view))
        _compare(pair[0], {"": pair[1], "_shuffled": before}, values)
        before = pair[1]
    if before is None:
        return {}
    result = {name: torch.cat(some).mean().item() for name, some in values.items()}
    for view, some in seen.items():
        predicted, true = torch.stack(some).unbind(1)
        found = retrieved(predicted, true, bootstrap, seed)
        prefix = "" if view == "luminance" else f"{view}/"
        result |= {prefix + name: value for name, value in found.items()}
    return result | ({"fid": distance.compute().item()} if distance is not None else {})


def _compare(
    drawn: Tensor, others: Mapping[str, Tensor | None], values: dict[str, list[Tensor]]
) -> None:
    """Add the measures of a drawn picture against each of the others to `values`."""
    for suffix, true in others.items():
        if true is not None and true.shape == drawn.shape:
            for metric in MEASURES:
                values.setdefault(metric.__name__ + suffix, []).append(metric(drawn, true))


def segmentation(
    rows: Iterable[Mapping[str, Any]],
    num_classes: int = 5,
    column: str = schema.SYNTHETIC_CLASSES,
) -> dict[str, Any]:
    """Agreement of predicted ids (`column`) with the true map (`classes`) at its own resolution.

    S(A) by default, and `_shuffled` with the true map of the row before; for true aerials pass rows
    that a segmenter filled from `aerial`. Empty where no row has both maps.
    """
    total = shuffled = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    pixels, before = 0, None
    for row in rows:
        if not (row[column] and row[schema.CLASSES]):
            continue
        truth = images.classes_of(images.decode(row[schema.CLASSES]), num_classes)
        ids = torch.from_numpy(images.decode_ids(row[column], truth.shape).copy())
        true = torch.from_numpy(truth)
        total = total + metrics.confusion(ids, true, num_classes)
        if before is not None and before.shape == ids.shape:
            shuffled = shuffled + metrics.confusion(ids, before, num_classes)
        pixels, before = pixels + true.numel(), true
    if not pixels:
        return {}
    mean, per_class = metrics.miou(total)
    return {
        "miou": mean,
        "miou_shuffled": metrics.miou(shuffled)[0],
        "accuracy": (total.diagonal().sum() / total.sum()).item(),
        "ignored": 1 - total.sum().item() / pixels,
        "iou": dict(zip(schema.LABELS, per_class, strict=False)),
        "confusion": total.tolist(),
    }


def retrieved(
    predicted: Float[Tensor, "row plane h w"],
    true: Float[Tensor, "row plane h w"],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Recall@1, @1 % and @10 % of each true picture among all, with intervals, by `metrics.planes`.

    A block of correlations at a time; no trained model in between.
    """
    ranked = []
    for begin in range(0, len(true), _CHUNK):
        part = predicted[begin : begin + _CHUNK]
        blocks = [metrics.retrieval_by_ncc(part, other) for other in true.split(_CHUNK)]
        own = torch.arange(begin, begin + len(part))
        ranked.append(metrics.ranks(torch.cat(blocks, dim=1), own))
    rank = torch.cat(ranked)
    result = {"gallery": float(len(true))}
    for name, share in (("recall@1", 1e-9), ("recall@1%", 0.01), ("recall@10%", 0.1)):
        result[name], k = metrics.recall_share(share, rank, len(true))
        low, high = metrics.bootstrap((rank < k).float(), bootstrap, seed)
        result |= {f"{name}_k": float(k), f"{name}_low": low, f"{name}_high": high}
    return result


def _planes(data: bytes, size: tuple[int, ...]) -> Float[Tensor, "1 3 h w"]:
    pixels = torch.from_numpy(images.decode(data, (size[0], size[1])).copy())
    return pixels.permute(2, 0, 1)[None].float() / 255
