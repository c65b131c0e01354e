"""A picture whose view is known -> the trained band, with north in its middle."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch.nn import functional as F

from cvmatch.data.photos.view import BAND_RATIO, BAND_SIZE, Pose, View
from cvmatch.nn.backbones import MEAN
from cvmatch.nn.geometry import GROUND_FOV

OVERSAMPLING = 2
"""Samples a pixel and axis, so that resampling does not alias."""


def make_band(
    image: Image.Image, view: View, pose: Pose
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"] | None]:
    """Return the band, and which of its pixels the picture shows; None: all."""
    area = view.area
    if pose.is_level and view.projection == "band":
        return _turn(np.asarray(image), pose.heading), None
    width = min(BAND_SIZE[1], round(view.turn_width(image.width)))
    size = (max(1, round(width / BAND_RATIO)), max(1, width))
    if area is not None and pose.is_level and view.fov == 360:
        high = area.full_width / BAND_RATIO
        top = area.full_height / 2 - high / 2 - area.top
        if top > -0.5 and top + high < image.height + 0.5:
            box = (0, max(0, top), image.width, min(image.height, top + high))
            small = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box)
            # The middle of a picture may not be the sphere's.
            middle = (area.left + area.width / 2 - area.full_width / 2) / area.full_width * 360
            return _turn(np.asarray(small), pose.heading + middle), None
    return _resample(image, view, pose, size)


def _turn(pixels: UInt8[np.ndarray, "h w 3"], heading: float) -> UInt8[np.ndarray, "h w 3"]:
    """Roll the columns so that north comes to the middle, by whole pixels."""
    return np.roll(pixels, round(heading / 360 * pixels.shape[1]), axis=1)


def _resample(
    image: Image.Image, view: View, pose: Pose, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """Sample a picture at the directions of a band of `size`; fill what it does not show."""
    factor = OVERSAMPLING * size[1] / view.turn_width(image.width)
    if factor < 1:
        reduced = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        view = view.scale(reduced[0] / image.width)
        image = image.resize(reduced, Image.Resampling.BICUBIC)
    rays = _rotate_rays(band_rays(size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), pose)
    x, y, seen = _project(rays, view, image.width, image.height)
    sampled = _sample(np.asarray(image), x, y, wrap=view.area is not None and view.fov == 360)
    shown = seen[..., None].astype(np.float32)
    fill = 255 * np.array(MEAN, np.float32)
    mixed = _mean_blocks(sampled * shown + fill * (1 - shown))
    return mixed.round().clip(0, 255).astype(np.uint8), _mean_blocks(shown)[..., 0] > 0.5


def band_rays(height: int, width: int) -> Float[np.ndarray, "height width 3"]:
    """Return the directions (east, north, up) of the pixels of a band, north in the middle."""
    azimuth = ((np.arange(width) + 0.5) / width - 0.5) * 2 * math.pi
    rise = np.radians((0.5 - (np.arange(height) + 0.5) / height) * GROUND_FOV)[:, None]
    east, north = np.cos(rise) * np.sin(azimuth), np.cos(rise) * np.cos(azimuth)
    return np.stack([east, north, np.broadcast_to(np.sin(rise), east.shape)], axis=-1)


def _rotate_rays(
    rays: Float[np.ndarray, "height width 3"], pose: Pose
) -> Float[np.ndarray, "height width 3"]:
    """Return directions (east, north, up) as a camera with a pose has them: right, ahead, up."""
    turn, rise, lean = (math.radians(angle) for angle in (pose.heading, pose.pitch, pose.roll))
    ahead = np.array(
        [math.sin(turn) * math.cos(rise), math.cos(turn) * math.cos(rise), math.sin(rise)]
    )
    level = np.array([math.cos(turn), -math.sin(turn), 0.0])
    above = np.cross(level, ahead)
    right = math.cos(lean) * level - math.sin(lean) * above
    up = math.cos(lean) * above + math.sin(lean) * level
    return rays @ np.stack([right, ahead, up], axis=1)


def _project(
    rays: Float[np.ndarray, "height width 3"], view: View, width: int, height: int
) -> tuple[
    Float[np.ndarray, "height width"],
    Float[np.ndarray, "height width"],
    Bool[np.ndarray, "height width"],
]:
    """Return where directions of the camera lie in the picture (x, y in pixels), and whether."""
    right, ahead, up = np.moveaxis(rays, -1, 0)
    if view.area is None:
        focal = width / 2 / math.tan(math.radians(view.fov) / 2)
        depth = np.maximum(ahead, 1e-6)
        x, y = width / 2 + focal * right / depth, height / 2 - focal * up / depth
        return x, y, (ahead > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    area = view.area
    x = (np.arctan2(right, ahead) / (2 * math.pi) + 0.5) * area.full_width - area.left
    y = (0.5 - np.arcsin(up.clip(-1, 1)) / math.pi) * area.full_height - area.top
    x %= area.full_width
    # A whole turn may lack a fraction of a pixel.
    inside = (x < width) | (view.fov == 360)
    return x.clip(0, width), y, inside & (y >= 0) & (y < height)


def _sample(
    pixels: UInt8[np.ndarray, "h w 3"],
    x: Float[np.ndarray, "height width"],
    y: Float[np.ndarray, "height width"],
    wrap: bool,
) -> Float[np.ndarray, "height width 3"]:
    """Sample pixels bilinearly at places in pixels (0.5 is the middle of the first)."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (0, 0)), "wrap" if wrap else "edge")
    place = np.stack([(x + 1) / padded.shape[1], y / padded.shape[0]], axis=-1) * 2 - 1
    source = torch.from_numpy(padded).permute(2, 0, 1)[None].float()
    grid = torch.from_numpy(place)[None].float()
    sampled = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    return sampled[0].permute(1, 2, 0).numpy()


def _mean_blocks(
    values: Float[np.ndarray, "height width channel"],
) -> Float[np.ndarray, "h w channel"]:
    height, width = (length // OVERSAMPLING for length in values.shape[:2])
    blocks = values.reshape(height, OVERSAMPLING, width, OVERSAMPLING, -1)
    return blocks.mean(axis=(1, 3))
