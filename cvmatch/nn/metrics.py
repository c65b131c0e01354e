"""Scores and pictures in, numbers of the protocols out; pure functions, named ready for MLflow."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer, Num
from torch import Tensor, nn

from cvmatch.data.schema import IGNORE

FLAT = 1e-4
"""L2 norm of the centred luminance (of values in [0, 1]) below which a picture is flat."""

_WINDOW = 11

Channel = Literal["luminance", "chroma", "gradient"]
"""What of pictures is compared."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion to mode L


def ranks(
    score: Float[Tensor, "query gallery"], truth: Int64[Tensor, " query"]
) -> Int64[Tensor, " query"]:
    """Rank each query's true item, zero-based, in [0, gallery - 1]; higher scores rank first.

    Every item that is not strictly worse ranks ahead, so ties count against the query, and so do
    NaN scores. Evaluations that count `score > own` (SAFA, Sample4Geo) give a collapsed embedding
    100 %; here it ranks last.

    Raises:
        ValueError: `truth` names an item outside the gallery.
    """
    _check_truth(score, truth)
    own = score.gather(1, truth[:, None])
    return (~(score < own)).sum(dim=1) - 1


def recall_at(ks: Sequence[int], rank: Int64[Tensor, " query"]) -> dict[str, float]:
    """Return the share of queries whose true item is among the k best; NaN without queries."""
    return {f"recall@{k}": (rank < k).double().mean().item() for k in ks}


def recall_share(share: float, rank: Int64[Tensor, " query"], gallery: int) -> tuple[float, int]:
    """Return the recall among the best `share` (in (0, 1]) of the gallery, and the k it means.

    k = floor(share * gallery), at least 1: 88 for 1 % of CVUSA's 8,884. Conventions in public code
    differ by one, so a table that gives R@1% has to give this k with it.
    """
    k = max(1, int(share * gallery + 1e-9))  # 0.29 * 100 is 28.999999999999996
    return (rank < k).double().mean().item(), k


def mean_reciprocal_rank(rank: Int64[Tensor, " query"]) -> float:
    """Return the mean of 1 / (one-based rank), in (0, 1]; NaN without queries.

    It moves where a true item comes nearer to the top, long before it is the first.
    """
    return (1 / (rank.double() + 1)).mean().item()


class Interval(NamedTuple):
    """A mean, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of a few independent values, with Student's 95 % interval.

    NaN where a value is NaN; the ends are NaN of a single value, which says nothing of its spread.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy import special  # noqa: PLC0415 (not in each process that measures something)

    width = float(special.stdtrit(len(values) - 1, 0.975))  # quantile of Student's t
    half = width * np.std(values, ddof=1) / math.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half))


def median_rank(rank: Int64[Tensor, " query"]) -> float:
    """Return the median of the one-based ranks; between two middle ranks, their mean."""
    return rank.double().quantile(0.5).item() + 1


def one_of_ten(
    score: Float[Tensor, "query gallery"],
    truth: Int64[Tensor, " query"],
    others: int = 9,
    seed: int = 0,
) -> dict[str, float]:
    """Return top-1 and top-5 shares, in [0, 1], of the true item among `others` random ones.

    The protocol of the published prototype, for comparison only: chance is 0.1 and 0.5. The others
    are drawn without replacement from the rest of the gallery, anew for each query.

    Raises:
        ValueError: the gallery holds fewer than `others` + 1 items, or `truth` is outside it.
    """
    _check_truth(score, truth)
    if score.shape[1] <= others:
        raise ValueError(
            f"one_of_ten: expected a gallery of at least {others + 1} items, got {score.shape[1]}. "
            "Evaluate on more pairs, or leave this protocol out."
        )
    generator = torch.Generator().manual_seed(seed)
    lot = torch.rand(score.shape, generator=generator).to(score.device)
    lot.scatter_(1, truth[:, None], 2.0)  # never drawn: the lots of the others are below 1
    drawn = lot.topk(others, dim=1, largest=False).indices
    candidates = torch.cat([score.gather(1, truth[:, None]), score.gather(1, drawn)], dim=1)
    rank = ranks(candidates, torch.zeros_like(truth))
    return {f"top{k}": recall_at([k], rank)[f"recall@{k}"] for k in (1, 5)}


def bootstrap(values: Float[Tensor, " n"], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval (low, high) of the mean of `values`; NaN without values.

    The percentile bootstrap (Efron and Tibshirani 1993, chapter 13): `draws` resamples with
    replacement. For a recall, pass the hits of the single queries, `(rank < k).float()`.
    """
    if not len(values):
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    values = values.detach().double().cpu()
    means = [
        values[torch.randint(len(values), (len(values),), generator=generator)].mean()
        for _ in range(draws)
    ]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()


def confusion(
    predicted: Integer[Tensor, "*pixel"], truth: Integer[Tensor, "*pixel"], num_classes: int
) -> Int64[Tensor, "num_classes num_classes"]:
    """Count pixels by true class (row) and predicted class (column), where truth is not IGNORE.

    Raises:
        ValueError: a counted pixel has an id outside [0, num_classes), on either side.
    """
    counted = truth != IGNORE
    rows, columns = truth[counted].long(), predicted[counted].long()
    for name, ids in (("predicted", columns), ("true", rows)):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_classes:
            raise ValueError(
                f"confusion: expected {name} class ids in [0, {num_classes}), "
                f"got {int(ids.min())} to {int(ids.max())}. Decode both with the same num_classes."
            )
    flat = torch.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def miou(confusion: Num[Tensor, "classes classes"]) -> tuple[float, list[float]]:
    """Return the mean intersection over union, in [0, 1], and the value of each class.

    IoU = true positives / (true + predicted - true positives), of the pooled counts as in Pascal
    VOC. A class that is neither true nor predicted anywhere is NaN and left out of the mean; one
    that is only predicted counts as 0. Any positive multiple of the counts gives the same answer.
    """
    counts = confusion.double()
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    per_class = torch.where(union > 0, hits / union, torch.nan)
    return per_class.nanmean().item(), per_class.tolist()


def psnr(
    predicted: Float[Tensor, "n 3 h w"], true: Float[Tensor, "n 3 h w"]
) -> Float[Tensor, " n"]:
    """Return the peak signal-to-noise ratio of pictures in [0, 1], in dB; inf where equal."""
    return -10 * torch.log10((predicted - true).square().mean(dim=(1, 2, 3)))


def ssim(
    predicted: Float[Tensor, "n 3 h w"], true: Float[Tensor, "n 3 h w"]
) -> Float[Tensor, " n"]:
    """Return the structural similarity, in [-1, 1], of pictures of values in [0, 1].

    Wang et al. 2004, as torchmetrics computes it: Gaussian window of 11 pixels with sigma 1.5 where
    it fits whole (sides of at least 11), C1 = 0.01^2, C2 = 0.03^2, mean over the channels. Written
    out, since importing torchmetrics costs every worker seconds.

    Raises:
        ValueError: a side is shorter than the window.
    """
    if min(true.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"ssim: expected sides of at least {_WINDOW}, got {tuple(true.shape[-2:])}"
        )
    mean_p, mean_t = _blurred(predicted), _blurred(true)
    var_p = (_blurred(predicted.square()) - mean_p.square()).clamp(min=0)
    var_t = (_blurred(true.square()) - mean_t.square()).clamp(min=0)
    shared = _blurred(predicted * true) - mean_p * mean_t
    light = (2 * mean_p * mean_t + 0.01**2) / (mean_p.square() + mean_t.square() + 0.01**2)
    return (light * (2 * shared + 0.03**2) / (var_p + var_t + 0.03**2)).mean(dim=(1, 2, 3))


def ncc(predicted: Float[Tensor, "n 3 h w"], true: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Correlate each picture's luminance with its true one, in [-1, 1]; 0 if one is flat."""
    return (_centred(predicted) * _centred(true)).sum(dim=1)


def planes(
    pictures: Float[Tensor, "n 3 h w"], channel: Channel = "luminance", size: int = 16
) -> Float[Tensor, "n plane {size} {size}"]:
    """Return a channel of RGB pictures, averaged to `size` x `size`, for `retrieval_by_ncc`.

    `luminance` is what generators are trained on; `chroma` (blue and red less luminance) and
    `gradient` (its magnitude at full size, Sobel) are not.
    """
    luma = torch.einsum("nchw,c->nhw", pictures, pictures.new_tensor(_LUMA))[:, None]
    seen = pictures[:, [2, 0]] - luma if channel == "chroma" else luma
    if channel == "gradient":
        slope = pictures.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        padded = nn.functional.pad(luma, (1, 1, 1, 1), mode="replicate")
        both = nn.functional.conv2d(padded, torch.stack([slope, slope.T])[:, None])
        seen = both.square().sum(dim=1, keepdim=True).sqrt()
    return nn.functional.adaptive_avg_pool2d(seen, size)


def standardize(planes: Float[Tensor, "n plane h w"]) -> Float[Tensor, "n _"]:
    """Return rows of mean 0 (of each plane) and norm 1; 0 for flat ones, which are noise."""
    rows = (planes - planes.mean(dim=(2, 3), keepdim=True)).flatten(1)
    norm = rows.norm(dim=1, keepdim=True)
    return torch.where(norm > FLAT, rows / norm, 0.0)


def retrieval_by_ncc(
    predicted: Float[Tensor, "row plane h w"], true: Float[Tensor, "column plane h w"]
) -> Float[Tensor, "row column"]:
    """Correlate, in [-1, 1], each predicted picture with every true one, of their `planes`.

    Does a generated tile identify its place, with no trained model in between? Rank with
    `ranks(scores, torch.arange(n))`. Flat pictures score 0.
    """
    return standardize(predicted) @ standardize(true).T


def _check_truth(score: Tensor, truth: Tensor) -> None:
    if len(truth) and not 0 <= int(truth.min()) <= int(truth.max()) < score.shape[1]:
        raise ValueError(
            f"ranks: expected true items in [0, {score.shape[1]}), the gallery's columns, "
            f"got {int(truth.min())} to {int(truth.max())}. Look the items up in this gallery."
        )


def _blurred(pictures: Tensor) -> Tensor:
    """Mean under a Gaussian window, where the window fits whole."""
    offset = torch.arange(_WINDOW, device=pictures.device, dtype=pictures.dtype) - _WINDOW // 2
    weight = torch.exp(-offset.square() / (2 * 1.5**2))
    weight = weight / weight.sum()
    planes = pictures.flatten(0, 1)[:, None]
    planes = nn.functional.conv2d(planes, weight[None, None, :, None])
    planes = nn.functional.conv2d(planes, weight[None, None, None, :])
    return planes.unflatten(0, pictures.shape[:2])[:, :, 0]


def _centred(pictures: Tensor) -> Tensor:
    """Luminance as rows of mean 0 and norm 1."""
    return standardize(torch.einsum("nchw,c->nhw", pictures, pictures.new_tensor(_LUMA))[:, None])
