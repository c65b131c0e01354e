"""Resample a part of a picture: area average where it gets smaller, bilinear where it grows."""

import math

import numpy as np
from jaxtyping import Float, Int, UInt8

VERSION = 1
"""Of the pixels that `resample` makes; it changes whenever they do."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels from the upper left corner of the upper left pixel."""


def resample(pixels: UInt8[np.ndarray, "h w 4"], box: Box, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Return the part of a picture in `box` as `size` x `size` pixels.

    Pixels are squares with their middles at 0.5. The fourth channel is how much of a pixel is
    known (0 to 255); colours are means of what is known, black where nothing is.
    """
    left, top, right, bottom = box
    known = pixels[..., 3]
    if known.min(initial=255) == 255:
        mixed = _mix(pixels[..., :3], (top, bottom), (left, right), size)
    else:
        weight = known[..., None].astype(np.float32)
        weighed = np.concatenate([pixels[..., :3] * weight, weight], axis=2)
        sums = _mix(weighed, (top, bottom), (left, right), size)
        mixed = sums[..., :3] / np.maximum(sums[..., 3:], 1e-6)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def average(known: UInt8[np.ndarray, "h w"], box: Box) -> float:
    """Return the mean over a box, in [0, 1], where 255 is 1 and all outside is 0."""
    left, top, right, bottom = box
    rows, columns = _overlaps(known.shape[0], top, bottom), _overlaps(known.shape[1], left, right)
    return float(rows @ known.astype(np.float64) @ columns) / 255


def _mix(
    pixels: np.ndarray, rows: tuple[float, float], columns: tuple[float, float], size: int
) -> Float[np.ndarray, "size size c"]:
    """Resample both axes, one after the other; the sums have one order on every machine."""
    high = _along_rows(pixels, *_taps(*rows, size, pixels.shape[0]))
    wide = _along_rows(high.swapaxes(0, 1), *_taps(*columns, size, pixels.shape[1]))
    return wide.swapaxes(0, 1)


def _along_rows(
    pixels: np.ndarray, index: Int[np.ndarray, "tap size"], weight: Float[np.ndarray, "tap size"]
) -> np.ndarray:
    total = np.zeros((index.shape[1], *pixels.shape[1:]), dtype=np.float32)
    for one, share in zip(index, weight, strict=True):
        total += pixels[one] * share[:, None, None]
    return total


def _taps(
    start: float, stop: float, size: int, count: int
) -> tuple[Int[np.ndarray, "tap size"], Float[np.ndarray, "tap size"]]:
    """Return which of `count` pixels each of `size` new ones is the sum of, and their weights."""
    scale = (stop - start) / size
    if scale > 1:
        edges = start + scale * np.arange(size + 1)
        index = np.floor(edges[:-1]).astype(np.int64) + np.arange(math.ceil(scale) + 1)[:, None]
        weight = np.minimum(index + 1, edges[1:]) - np.maximum(index, edges[:-1])
    else:
        middle = start + scale * (np.arange(size) + 0.5) - 0.5
        index = np.floor(middle).astype(np.int64) + np.arange(2)[:, None]
        weight = 1 - np.abs(index - middle)
    weight = np.maximum(weight, 0)
    return np.clip(index, 0, count - 1), (weight / weight.sum(0)).astype(np.float32)


def _overlaps(count: int, start: float, stop: float) -> Float[np.ndarray, " count"]:
    """Return the share of the interval that each of `count` pixels covers."""
    pixel = np.arange(count)
    return np.clip(np.minimum(pixel + 1, stop) - np.maximum(pixel, start), 0, 1) / (stop - start)
