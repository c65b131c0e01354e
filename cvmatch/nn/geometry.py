"""Map between a panorama and its tile: polar view, rotation, crops by azimuth, bird's-eye view.

Convention (CVUSA, verified on real pairs): the tile is north up; the panorama's middle column looks
north, column 0 south, a quarter west, and azimuth grows clockwise with the column. The polar view
of a tile has the same columns.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

GROUND_FOV = 224 / 616 * 180
"""Vertical field of view of CVUSA's 1232 x 224 panoramas, in degrees (65.45)."""


def polar_grid(height: int, width: int) -> Float[Tensor, "height width 2"]:
    """Return where each pixel of the polar view lies on the tile, as grid_sample's (x, y).

    Both are in [-1, 1].

    Formula of SAFA (Shi et al. 2019): r = S/2 * (h-1-i)/h, theta = 2 pi j/w,
    row = S/2 + r cos theta, col = S/2 - r sin theta.
    The bottom row is the camera, the top row the tile's inscribed circle.
    Pixel i covers [i, i + 1) here and is centred on i in SAFA's code: half a pixel apart, in return
    for which a quarter turn of the tile is an exact roll of its polar view.
    """
    radius = (height - 1 - torch.arange(height, dtype=torch.float32)) / height
    theta = 2 * math.pi * torch.arange(width, dtype=torch.float32) / width
    x = -radius[:, None] * torch.sin(theta)
    y = radius[:, None] * torch.cos(theta)
    return torch.stack([x, y], dim=-1)


def to_polar(
    tile: Float[Tensor, "batch channel size size"], height: int, width: int, mode: str = "bilinear"
) -> Float[Tensor, "batch channel height width"]:
    """Return the polar view of tiles, columns as in the panorama; "nearest" for class maps."""
    grid = polar_grid(height, width).to(tile)[None].expand(len(tile), -1, -1, -1)
    return F.grid_sample(tile, grid, mode=mode, padding_mode="border", align_corners=False)


def to_polar_image(
    tile: UInt8[np.ndarray, "size size ..."], height: int, width: int, nearest: bool = False
) -> UInt8[np.ndarray, "height width ..."]:
    """Return the polar view of one picture (RGB) or one map of ids (two axes; use `nearest`)."""
    pixels = torch.from_numpy(np.atleast_3d(tile).astype(np.float32)).permute(2, 0, 1)[None]
    view = to_polar(pixels, height, width, "nearest" if nearest else "bilinear")[0]
    return view.permute(1, 2, 0).round().byte().numpy().reshape(height, width, *tile.shape[2:])


def cartesian_grid(size: int) -> Float[Tensor, "size size 2"]:
    """Return where each cell of a north-up map lies in a polar picture, (x, y) in [-1, 1].

    x is the azimuth (-1 and 1 are south, 0 is north), y the distance from the centre: -1 at the
    inscribed circle, 1 at the camera; corners beyond the circle clamp. Inverse of `polar_grid`.
    """
    centre = (torch.arange(size, dtype=torch.float32) + 0.5) * 2 / size - 1
    south, east = torch.meshgrid(centre, centre, indexing="ij")
    azimuth = torch.atan2(east, -south)  # clockwise from north
    radius = torch.sqrt(east**2 + south**2).clamp(max=1)
    return torch.stack([azimuth / math.pi, 1 - 2 * radius], dim=-1)


def polar_to_cartesian(
    polar: Float[Tensor, "batch channel radius column"], size: int
) -> Float[Tensor, "batch channel size size"]:
    """Resample a polar feature map as a north-up map; rows run from far (0) to the camera (last).

    The azimuth wraps: the first column is repeated behind the last, so that south has no seam.
    """
    columns = polar.shape[-1]
    wrapped = torch.cat([polar[..., -1:], polar, polar[..., :1]], dim=-1)
    grid = cartesian_grid(size).to(polar)
    # Column j looks along 2 pi j / w, its left edge, as in `polar_grid`; +1 is the wrapped column.
    column = (grid[..., 0] + 1) / 2 * columns + 1
    x = (column + 0.5) / (columns + 2) * 2 - 1
    y = grid[..., 1] - 1 / polar.shape[-2]  # row i lies at its lower edge, (h - 1 - i) / h
    grid = torch.stack([x, y], dim=-1)[None].expand(len(polar), -1, -1, -1)
    return F.grid_sample(wrapped, grid, padding_mode="border", align_corners=False)


def rotate90_panorama(
    panorama: Shaped[Tensor, "row channel height width"],
    turns: Int64[Tensor, " row"],
    mirror: Bool[Tensor, " row"],
) -> Shaped[Tensor, "row channel height width"]:
    """Rotate panoramas as `rotate90_tile` rotates their tiles; exact where 4 divides the width.

    Mirroring keeps column 0, which looks south in both (column j becomes column -j), so the polar
    view of a rotated tile is the rotated polar view.
    """
    width = panorama.shape[-1]
    column = torch.arange(width, device=panorama.device)[None]
    column = torch.where(mirror[:, None], -column, column) + turns[:, None] * (width // 4)
    index = (column % width)[:, None, None].expand(-1, *panorama.shape[1:3], -1)
    return panorama.gather(-1, index)


def rotate90_tile(
    tile: Shaped[Tensor, "row *channel size size"],
    turns: Int64[Tensor, " row"],
    mirror: Bool[Tensor, " row"],
) -> Shaped[Tensor, "row *channel size size"]:
    """Rotate tiles or maps by `turns` quarters counter-clockwise, then mirror east and west."""
    rows = (-1,) + (1,) * (tile.ndim - 1)
    tile = torch.where((turns % 2 == 1).view(rows), tile.rot90(1, (-2, -1)), tile)
    tile = torch.where((turns >= 2).view(rows), tile.rot90(2, (-2, -1)), tile)
    return torch.where(mirror.view(rows), tile.flip(-1), tile)


def crop_starts(width: int, crop: int, crops: int) -> list[int]:
    """Return the first columns of `crops` windows of `crop` columns, evenly spaced in azimuth."""
    return [round(index * width / crops - crop / 2) % width for index in range(crops)]


def crop_azimuths(
    panorama: Float[Tensor, "batch channel height width"], crops: int
) -> Float[Tensor, "batch crops channel height height"]:
    """Cut square windows around the azimuth; the first is centred on south (column 0) and wraps."""
    height, width = panorama.shape[-2:]
    columns = torch.arange(height)
    windows = [
        panorama[..., (start + columns) % width] for start in crop_starts(width, height, crops)
    ]
    return torch.stack(windows, dim=1)


def crop_field_of_view(
    panorama: Float[Tensor, "batch channel height width"],
    degrees: float,
    heading: Float[Tensor, " batch"],
) -> Float[Tensor, "batch channel height part"]:
    """Cut the part of each panorama that a camera of `degrees` sees when it looks along `heading`.

    Both are in degrees; headings are clockwise from north. 360 keeps all columns and only rolls.
    """
    width = panorama.shape[-1]
    part = max(1, round(width * degrees / 360))
    heading = heading.to(panorama.device)
    first = (width * (0.5 + heading / 360) - part / 2).round().long()
    column = (first[:, None] + torch.arange(part, device=panorama.device)) % width
    return panorama.gather(-1, column[:, None, None].expand(-1, *panorama.shape[1:3], -1))


def try_headings(
    panorama: Float[Tensor, "batch channel height width"], count: int
) -> Float[Tensor, "batch count channel height width"]:
    """Turn panoramas whose middle may look anywhere so that north would come to the middle.

    The i-th turn is right for a middle that looks 360 i / `count` degrees clockwise from north.
    """
    turns = [panorama.new_full((len(panorama),), -heading) for heading in tried(count)]
    return torch.stack([crop_field_of_view(panorama, 360.0, turn) for turn in turns], dim=1)


def tried(count: int) -> list[float]:
    """Return the headings of `try_headings`, in degrees."""
    return [360 * index / count for index in range(count)]


def see_part(
    panorama: Float[Tensor, "batch channel height width"],
    degrees: Float[Tensor, " batch"],
    heading: Float[Tensor, " batch"],
    fill: Float[Tensor, " channel"],
) -> Float[Tensor, "batch channel height width"]:
    """Keep of each panorama (north in the middle) what a camera of `degrees` sees, in its place.

    Args:
        panorama: Pictures.
        degrees: Field of view of each, in (0, 360].
        heading: Where the camera looks, in degrees clockwise from north.
        fill: Colour of the rest.
    """
    width = panorama.shape[-1]
    azimuth = (torch.arange(width, device=panorama.device) + 0.5) / width * 360 - 180
    off = (azimuth - heading.to(panorama.device)[:, None] + 180) % 360 - 180
    seen = (off.abs() <= degrees.to(panorama.device)[:, None] / 2)[:, None, None]
    return torch.where(seen, panorama, fill.to(panorama)[:, None, None])
