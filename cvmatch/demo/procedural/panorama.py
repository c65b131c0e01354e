"""The street panorama: exact first hits of a height field, then crowns, haze and sky."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt16
from PIL import Image

from cvmatch.demo.procedural.paints import BUILDINGS, CARS, PLANTS, SKY
from cvmatch.demo.procedural.roads import CELL
from cvmatch.demo.procedural.view import (
    Photometry,
    Window,
    add_crowns,
    apply_light,
    cut_window,
    develop,
    sample_photometry,
    trace_sunlight,
)
from cvmatch.demo.procedural.world import World, make_noise

VERTICAL_FOV = 224 / 616 * 180
"""Vertical field of view of CVUSA's panoramas, in degrees (65.45)."""
REACH = 108.0
"""How far a panorama sees, in metres."""
_SHADOWS = 60.0  # metres within which shadows are drawn
_STEEPEST = 40.0  # bound on slopes (rise over run), so that columns stay apart in one sorted list


@dataclass(frozen=True)
class _Rays:
    """Samples along the ray of each column, out to REACH."""

    view: Window
    eye: Float[np.ndarray, "3"]  # east, south (in the window, metres), elevation
    east: Float[np.ndarray, "column 1"]  # direction of the column
    south: Float[np.ndarray, "column 1"]
    distance: Float[np.ndarray, " step"]
    cell: Int[np.ndarray, "column step"]  # flat index into the window

    def cells(
        self, column: Int[np.ndarray, "..."], distance: Float[np.ndarray, "..."]
    ) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """Fractional column and row in the window at a distance along rays."""
        x = self.eye[0] + self.east[column, 0] * distance
        y = self.eye[1] + self.south[column, 0] * distance
        return x * np.float32(1 / CELL), y * np.float32(1 / CELL)


@dataclass(frozen=True)
class _Hits:
    """What each pixel sees of the solid surface. Arrays are (column, row), as the rays."""

    step: Int[np.ndarray, "column row"]  # index of the sample; len(distance) is the sky
    wall: Bool[np.ndarray, "column row"]
    distance: Float[np.ndarray, "column row"]


def render_panorama(
    rng: np.random.Generator,
    world: World,
    at: Float[np.ndarray, "2"],
    size: tuple[int, int],
    turn: float = 0.0,
    vertical_fov: float = VERTICAL_FOV,
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """RGB panorama and ground annotation seen from `at` (metres east, south).

    The middle column looks `turn` degrees clockwise of north. `size` is (height, width);
    `vertical_fov` are degrees around the horizon, 180 for a whole sphere.
    """
    height, width = size
    photometry = sample_photometry(rng)
    view = cut_window(rng, world, at, REACH + 1, photometry, clear=5.0)
    rays = _cast(rng, view, at, width, turn)
    # Slopes of the rows from the bottom up, so that they ascend.
    rise = (np.arange(height) + 0.5) / height - 0.5
    slope = np.tan(np.radians(rise * vertical_fov)).astype(np.float32)
    slope = slope.clip(-_STEEPEST / 2, _STEEPEST / 2)  # the zenith is sky, the nadir ground
    hits = _find_first_hits(rays, slope)
    crown = _find_crown_hits(rng, rays, hits, slope)
    sunlight = _trace_sunlight(view, rays, photometry)
    colour, ground = _solid(rng, world, rays, hits, slope, photometry, sunlight)
    _paint_crowns(rng, rays, hits, crown, slope, photometry, (colour, ground))
    sky = (hits.step == len(rays.distance)) & (crown < 0)
    far = np.where(crown >= 0, rays.distance[crown], hits.distance)
    _air(rng, colour, sky, far, slope, photometry)
    ground[sky] = SKY
    picture = develop(colour.transpose(1, 0, 2)[::-1], photometry)
    return picture, np.ascontiguousarray(ground.T[::-1])


def _cast(rng: np.random.Generator, view: Window, at: np.ndarray, width: int, turn: float) -> _Rays:
    # Column 0 looks south; azimuth grows clockwise.
    azimuth = np.pi + 2 * np.pi * np.arange(width)[:, None] / width + np.radians(turn)
    east, south = np.sin(azimuth).astype(np.float32), -np.cos(azimuth).astype(np.float32)
    steps = [0.6]
    while steps[-1] < REACH:
        steps.append(steps[-1] + max(0.3, 0.018 * steps[-1]))
    distance = np.array(steps, np.float32)
    x, y = (at - view.origin).astype(np.float32)
    last = np.array(view.top.shape) - 1
    col = np.clip((x + east * distance) / CELL, 0, last[1]).astype(np.int32)
    row = np.clip((y + south * distance) / CELL, 0, last[0]).astype(np.int32)
    floor = view.top[int(y / CELL), int(x / CELL)]
    eye = np.array([x, y, floor + rng.uniform(2.1, 2.8)], np.float32)
    return _Rays(view, eye, east, south, distance, row * np.int32(view.top.shape[1]) + col)


def _find_first_hits(rays: _Rays, slope: Float[np.ndarray, " row"]) -> _Hits:
    """First hits of all pixels by one binary search in the running maximum of slope along rays."""
    top = rays.view.top.ravel()[rays.cell]
    seen = np.maximum.accumulate((top - rays.eye[2]) / rays.distance, axis=1)
    columns, steps = seen.shape
    # The last sample ends each column's list; columns are kept apart by adding a constant each.
    base = np.arange(columns)[:, None] * (2.0 * _STEEPEST)
    keys = np.clip(seen, -_STEEPEST, _STEEPEST) + base
    step = np.searchsorted(keys.ravel(), (slope + base).ravel()).reshape(columns, -1)
    step = np.clip(step - np.arange(columns)[:, None] * steps, 0, steps)
    hit = np.minimum(step, steps - 1)
    column = np.arange(columns)[:, None]
    before = np.maximum(hit - 1, 0)
    z, previous = top[column, hit], top[column, before]
    paint = rays.view.paint.ravel()[rays.cell]
    kind = paint[column, hit]
    car = (kind >= CARS) & (kind < BUILDINGS)
    wall = (z - previous > 0.4) & (car | (kind != paint[column, before]))
    near, far = rays.distance[before], rays.distance[hit]
    with np.errstate(divide="ignore"):
        exact = np.clip((z - rays.eye[2]) / slope, near, far)
    # In the first sample's reach the ground starts under the camera.
    exact = np.where(hit == 0, np.minimum((z - rays.eye[2]) / slope, far), exact)
    return _Hits(step, wall, np.where(wall, far, exact).astype(np.float32))


def _find_crown_hits(
    rng: np.random.Generator, rays: _Rays, hits: _Hits, slope: Float[np.ndarray, " row"]
) -> Int[np.ndarray, "column row"]:
    """Step at which each pixel meets a crown before the solid surface; -1 for none.

    Each sample under a crown covers an interval of rows; painted from far to near, the nearest
    stays. Ragged ends let the sky through.
    """
    columns, rows = hits.step.shape
    top = rays.view.crown_top.ravel()[rays.cell.T]
    step, column = np.nonzero(top > -999)
    step, column = step[::-1], column[::-1]
    cell, distance = rays.cell[column, step], rays.distance[step]
    ragged = rng.uniform(-0.16, 0.16, (2, len(step))).astype(np.float32)
    high = (rays.view.crown_top.ravel()[cell] + ragged[0] - rays.eye[2]) / distance
    low = (rays.view.crown_bottom.ravel()[cell] + ragged[1] - rays.eye[2]) / distance
    first = np.searchsorted(slope, low)
    count = np.maximum(np.searchsorted(slope, high) - first, 0)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    row = np.repeat(first, count) + within
    found = np.full((columns, rows), -1, np.int32)
    found[np.repeat(column, count), row] = np.repeat(step, count)
    found[found >= hits.step] = -1
    return found


def _trace_sunlight(view: Window, rays: _Rays, photometry: Photometry) -> Float[np.ndarray, "s e"]:
    """Shadows around the camera, worked out in cells of 1 m; beyond _SHADOWS all is lit."""
    surface = add_crowns(view)[0]
    lightness = np.ones(surface.shape, np.float32)
    col, row = (rays.eye[:2] / CELL).astype(int)
    reach = round(_SHADOWS / CELL)
    box = (slice(max(row - reach, 0), row + reach), slice(max(col - reach, 0), col + reach))
    coarse = Image.fromarray(trace_sunlight(surface[box][::2, ::2], photometry.sun, 2 * CELL, 26.0))
    full = surface[box].shape
    lightness[box] = np.asarray(coarse.resize((full[1], full[0]), Image.Resampling.BILINEAR))
    return lightness


def _solid(
    rng: np.random.Generator,
    world: World,
    rays: _Rays,
    hits: _Hits,
    slope: Float[np.ndarray, " row"],
    photometry: Photometry,
    sunlight: Float[np.ndarray, "s e"],
) -> tuple[Float[np.ndarray, "column row 3"], UInt8[np.ndarray, "column row"]]:
    """Colour and annotation of ground, roofs, walls and cars."""
    column = np.broadcast_to(np.arange(len(hits.step))[:, None], hits.step.shape)
    x, y = rays.cells(column, hits.distance)
    last = np.array(rays.view.top.shape) - 1
    col, row = np.clip(x, 0, last[1]).astype(np.int32), np.clip(y, 0, last[0]).astype(np.int32)
    hit = rays.cell[column, np.minimum(hits.step, len(rays.distance) - 1)]
    cell = np.where(hits.wall, hit, row * np.int32(last[1] + 1) + col)
    paint = rays.view.paint.ravel()[cell]
    grain = rays.view.grain.ravel()[cell]
    colour = rays.view.albedo[paint] * grain[..., None]
    bright = sunlight[row, col]
    _smooth(rays, hits, x, y, sunlight, (colour, bright))
    ground = world.paints.ground[paint]
    elevation = rays.eye[2] + slope * hits.distance
    walls = hits.wall & (paint >= BUILDINGS) & (hits.step < len(rays.distance))
    if walls.any():
        index = np.nonzero(walls)
        facade, facing = _facades(world, rays, index[0], elevation[index], paint[index], photometry)
        colour[index] = facade
        # A wall's own cell is a roof: the shadow that counts is that of the ground before it.
        step = np.maximum(hits.step[index] - 2, 0)
        before = rays.cell[index[0], step]
        bright[index] = facing * (0.3 + 0.7 * sunlight.ravel()[before])
    cars = hits.wall & (paint >= CARS) & (paint < BUILDINGS)
    above = elevation - rays.view.floor.ravel()[cell]
    colour[cars & (above < 0.3)] *= 0.3  # tyres and shade
    colour[cars & (above > 0.88) & (above < 1.32)] = (0.12, 0.15, 0.18)  # windows
    bright[hits.wall & (paint < BUILDINGS)] *= 0.75
    colour *= rng.normal(1, 0.03, (*hits.step.shape, 1)).astype(np.float32)
    return apply_light(colour, bright, photometry), ground


def _smooth(
    rays: _Rays,
    hits: _Hits,
    x: Float[np.ndarray, "column row"],
    y: Float[np.ndarray, "column row"],
    sunlight: Float[np.ndarray, "s e"],
    target: tuple[Float[np.ndarray, "column row 3"], Float[np.ndarray, "column row"]],
) -> None:
    """Bilinear colours and shadows on the ground within 25 m, where cells exceed pixels."""
    near = np.nonzero((hits.distance < 25) & ~hits.wall & (hits.step < len(rays.distance)))
    x, y = x[near] - np.float32(0.5), y[near] - np.float32(0.5)
    col, row = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    fx, fy = (x - col)[:, None], (y - row)[:, None]
    paint, grain = rays.view.paint, rays.view.grain
    colour, bright = (np.zeros((len(x), n), np.float32) for n in (3, 1))
    for dr, wy in ((0, 1 - fy), (1, fy)):
        for dc, wx in ((0, 1 - fx), (1, fx)):
            at = (row + dr, col + dc)
            colour += rays.view.albedo[paint[at]] * (wx * wy * grain[at][:, None])
            bright += wx * wy * sunlight[at][:, None]
    target[0][near], target[1][near] = colour, bright[:, 0]


def _facades(
    world: World,
    rays: _Rays,
    column: Int[np.ndarray, " pixel"],
    elevation: Float[np.ndarray, " pixel"],
    paint: UInt16[np.ndarray, " pixel"],
    photometry: Photometry,
) -> tuple[Float[np.ndarray, "pixel 3"], Float[np.ndarray, " pixel"]]:
    """Colour of wall pixels and how far they face the sun: exact hit of a box, then windows."""
    houses, house = world.houses, paint.astype(np.int32) - BUILDINGS
    axis = houses.axis[house]
    centre = houses.centre[house] - rays.view.origin.astype(np.float32)
    x, y = rays.eye[0] - centre[:, 0], rays.eye[1] - centre[:, 1]
    east, south = rays.east[column, 0], rays.south[column, 0]
    eye = np.stack([x * axis[:, 0] + y * axis[:, 1], y * axis[:, 0] - x * axis[:, 1]], axis=1)
    ray = np.stack(
        [east * axis[:, 0] + south * axis[:, 1], south * axis[:, 0] - east * axis[:, 1]], axis=1
    )
    ray = np.where(np.abs(ray) < 1e-4, np.float32(1e-4), ray)
    entry = (-np.sign(ray) * houses.half[house] - eye) / ray
    side = entry.argmax(axis=1)  # 0: gable end, 1: along the street
    pixel = np.arange(len(house))
    other = 1 - side
    u = eye[pixel, other] + ray[pixel, other] * entry[pixel, side]
    reach = houses.half[house, other]
    spacing, floor = houses.window[house].T
    z = elevation - houses.base[house]
    eaves = houses.eaves[house]
    across, up = np.abs(u / spacing % 1 - 0.5), z / floor % 1
    window = (across < 0.21) & (up > 0.32) & (up < 0.80) & (z < eaves - 0.35)
    window &= (np.abs(u) < reach - 0.5) & (z > 0.5)
    shop = (houses.shop[house] > 0) & (z > 0.4) & (z < 2.7) & (u / 4 % 1 > 0.08)
    door = (side == 1) & (np.abs(u - 0.4 * reach) < 0.55) & (z < 2.1)
    colour = houses.facade[house]
    colour = (
        colour * (1 - 0.12 * (z < 0.5) + 0.05 * np.sin(house * 1.7 + np.floor(z / floor)))[:, None]
    )
    colour[window | shop] = (0.17, 0.21, 0.25)
    colour[door & ~window] *= 0.45
    normal = -np.sign(ray[pixel, side])
    sun = photometry.sun
    toward = np.stack([sun[0] * axis[:, 0] + sun[1] * axis[:, 1],
                       sun[1] * axis[:, 0] - sun[0] * axis[:, 1]], axis=1)  # fmt: skip
    facing = np.clip(normal * toward[pixel, side], 0, 1) * 1.1
    return colour.astype(np.float32), facing.astype(np.float32)


def _paint_crowns(
    rng: np.random.Generator,
    rays: _Rays,
    hits: _Hits,
    crown: Int[np.ndarray, "column row"],
    slope: Float[np.ndarray, " row"],
    photometry: Photometry,
    target: tuple[Float[np.ndarray, "column row 3"], UInt8[np.ndarray, "column row"]],
) -> None:
    """Leaves over what lies behind: bright on top and toward the sun, dark inside, mottled."""
    colour, ground = target
    column, row = np.nonzero(crown >= 0)
    step = crown[column, row]
    cell, distance = rays.cell[column, step], rays.distance[step]
    top, bottom = rays.view.crown_top.ravel()[cell], rays.view.crown_bottom.ravel()[cell]
    z = rays.eye[2] + slope[row] * distance
    depth = np.clip((z - bottom) / np.maximum(top - bottom, 1.0), 0, 1)
    # The near side is lit when the sun stands behind the camera.
    sun = photometry.sun
    behind = -(rays.east[column, 0] * sun[0] + rays.south[column, 0] * sun[1])
    bright = (0.25 + 0.65 * depth) * (1 + 0.5 * behind)
    leaves = make_noise(rng, 96, 128)[
        (column * 128 // crown.shape[0]) % 128, row * 128 // crown.shape[1]
    ]
    mottle = np.clip(1 + 0.16 * leaves + 0.16 * rng.standard_normal(len(row)), 0.35, 1.8)
    albedo = rays.view.albedo[rays.view.crown.ravel()[cell]] * mottle[:, None].astype(np.float32)
    colour[column, row] = apply_light(albedo, bright.astype(np.float32), photometry)
    ground[column, row] = PLANTS


def _air(
    rng: np.random.Generator,
    colour: Float[np.ndarray, "column row 3"],
    sky: Bool[np.ndarray, "column row"],
    distance: Float[np.ndarray, "column row"],
    slope: Float[np.ndarray, " row"],
    photometry: Photometry,
) -> None:
    """Haze over what is far, sky with clouds, and a far ridge under it."""
    columns, rows = sky.shape
    haze = np.array([0.74, 0.80, 0.86], np.float32) * rng.uniform(0.85, 1.05)
    fade = np.exp(-distance / np.float32(photometry.haze))[..., None]
    colour *= fade
    colour += haze * (1 - fade)
    height = np.clip(slope / 0.64, 0, 1)[None, :, None]
    blue = np.array([0.36, 0.56, 0.86], np.float32) * rng.uniform(0.8, 1.1)
    heaven = haze + (blue - haze) * np.sqrt(height)
    cover = rng.uniform(-0.9, 1.2)
    clouds = Image.fromarray(make_noise(rng, 12, 64) + 0.5 * make_noise(rng, 30, 64))
    clouds = np.asarray(clouds.resize((rows, columns), Image.Resampling.BICUBIC))
    veil = np.clip((clouds + cover) * 0.7, 0, 0.92)[..., None] * np.clip(height * 5, 0, 1)
    heaven = heaven + (np.float32(rng.uniform(0.82, 0.97)) - heaven) * veil
    wave = np.arange(columns) * (2 * np.pi / columns)
    ridge = 0.012 + 0.008 * np.sin(wave * 3 + rng.uniform(0, 6)) + 0.006 * np.sin(wave * 7)
    land = slope[None] < ridge[:, None]
    hills = haze * 0.55 + np.array([0.12, 0.16, 0.10], np.float32)
    colour[sky] = np.where(land[..., None], hills, heaven)[sky]
