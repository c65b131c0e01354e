"""Pixels are means of the ground that they show, and lie where they should to a part of a pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmatch.gallery.resampling import Box, average, resample


def box(*sides: float) -> Box:
    left, top, right, bottom = map(float, sides)
    return left, top, right, bottom


def picture(height: int, width: int, seed: int = 0, known: int = 255) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = known
    return pixels


def mean_of_samples(pixels: np.ndarray, part: Box, size: int, samples: int = 64) -> np.ndarray:
    """The mean of points that lie densely in each new pixel: a plain area average."""
    left, top, right, bottom = part
    steps = (np.arange(size * samples) + 0.5) / (size * samples)
    rows = np.floor(top + steps * (bottom - top)).astype(int)
    columns = np.floor(left + steps * (right - left)).astype(int)
    dense = pixels[rows][:, columns, :3].astype(float)
    return dense.reshape(size, samples, size, samples, 3).mean(axis=(1, 3))


def test_same_size_is_the_same_picture():
    pixels = picture(12, 12)
    assert np.array_equal(resample(pixels, box(2, 3, 10, 11), 8), pixels[3:11, 2:10, :3])


def test_half_the_size_is_the_mean_of_four():
    pixels = picture(10, 10)
    means = pixels[1:9, 1:9, :3].astype(float).reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(resample(pixels, box(1, 1, 9, 9), 4) - means).max() <= 0.5


@settings(deadline=None)  # a busy machine is no failure
@given(st.floats(1, 5), st.floats(1, 5), st.floats(1.01, 3.9), st.integers(0, 9))
def test_smaller_picture_is_the_mean_of_the_area_under_each_pixel(left, top, scale, seed):
    pixels = picture(48, 48, seed)
    part = box(left, top, left + 10 * scale, top + 10 * scale)
    expected = mean_of_samples(pixels, part, 10)
    assert np.abs(resample(pixels, part, 10) - expected).max() <= 0.5 + 255 * 2 / 64


@pytest.mark.parametrize("scale", [0.25, 0.7, 1.0])
def test_larger_picture_goes_on_a_ramp_from_middle_to_middle(scale):
    ramp = picture(40, 40)
    ramp[..., 0] = np.arange(40) * 4
    ramp[..., 1] = np.arange(40)[:, None] * 4
    found = resample(ramp, box(5.25, 6.5, 5.25 + 16 * scale, 6.5 + 16 * scale), 16)
    middles = (np.arange(16) + 0.5) * scale
    assert np.abs(found[0, :, 0] - 4 * (5.25 + middles - 0.5)).max() <= 0.5
    assert np.abs(found[:, 0, 1] - 4 * (6.5 + middles - 0.5)).max() <= 0.5


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_unknown_pixels_do_not_darken_their_neighbours(scale):
    pixels = picture(40, 40)
    pixels[..., :3] = (200, 100, 50)
    pixels[:, 20:] = 0
    found = resample(pixels, box(2, 2, 2 + 20 * scale, 2 + 20 * scale), 20)
    edge = (20 - 2) / scale
    assert np.all(found[:, : int(edge)] == (200, 100, 50))
    assert np.all(found[:, int(np.ceil(edge)) + 1 :] == 0)


def test_known_pixels_weigh_by_how_much_they_are_known():
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0] = (100, 0, 0, 255)
    pixels[1] = (40, 0, 0, 51)
    assert resample(pixels, box(0, 0, 2, 2), 1)[0, 0].tolist() == [90, 0, 0]


def test_average_counts_parts_of_pixels_and_nothing_outside():
    known = np.zeros((4, 4), dtype=np.uint8)
    known[:, 2:] = 255
    assert average(known, box(0, 0, 4, 4)) == 0.5
    assert average(known, box(1.5, 0, 2.5, 4)) == 0.5
    assert average(known, box(3, 0, 5, 2)) == 0.5
