"""What both views share: a window of the world with its own cars, sun, season and camera."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt16

from cvmatch.demo.procedural.paints import CARS, Paint, Season
from cvmatch.demo.procedural.roads import CELL, CELLS
from cvmatch.demo.procedural.world import World

Layer = Float[np.ndarray, "south east"]
Colour = Float[np.ndarray, "... 3"]


@dataclass(frozen=True, kw_only=True)
class Photometry:
    """Light, season and camera of ONE view. The two views of a pair draw it independently."""

    sun: Float[np.ndarray, "3"]
    """Unit vector to the sun: east, south, up."""
    tint: Float[np.ndarray, "season 3"]
    """Factor on the colours of each Season."""
    direct: float
    """Brightness of the sunlight; the sky gives the rest up to 1."""
    haze: float
    """Distance in metres at which haze hides 63 %."""
    gain: Float[np.ndarray, "3"]
    """Exposure and white balance, by channel."""
    gamma: float
    """Exponent of the camera's curve."""
    saturation: float
    """1 keeps the colours, 0 makes grey."""


def sample_photometry(rng: np.random.Generator) -> Photometry:
    """Draw a view's photometry. The sun is always in the southern half of the sky."""
    azimuth, height = np.radians(rng.uniform(105, 255)), np.radians(rng.uniform(25, 62))
    sun = [np.sin(azimuth) * np.cos(height), -np.cos(azimuth) * np.cos(height), np.sin(height)]
    dry, autumn = rng.uniform() ** 1.5, max(0.0, rng.uniform(-1.6, 1.0))
    tint = np.ones((len(Season), 3))
    tint[Season.GRASS] += dry * np.array([0.55, 0.16, 0.05])
    tint[Season.CROP] += rng.uniform() * np.array([0.45, 0.12, -0.1])
    tint[Season.LEAVES] += autumn * np.array([1.1, 0.15, -0.15])
    tint[1:] *= rng.normal(1, 0.08, (len(Season) - 1, 1))
    balance = rng.normal(0, 0.05)
    gain = rng.uniform(0.88, 1.22) * np.array([1 + balance, 1.0, 1 - balance])
    return Photometry(
        sun=np.array(sun, np.float32),
        tint=tint.astype(np.float32),
        direct=rng.uniform(0.35, 0.75),
        haze=float(np.exp(rng.uniform(np.log(250), np.log(1200)))),
        gain=gain.astype(np.float32),
        gamma=rng.uniform(0.72, 1.0),
        saturation=rng.uniform(0.7, 1.25),
    )


def develop(
    colour: Float[np.ndarray, "h w 3"], photometry: Photometry
) -> UInt8[np.ndarray, "h w 3"]:
    """Light -> pixels: saturation, gain and gamma, by a table over 4,096 levels."""
    grey = colour @ np.array([0.3, 0.59, 0.11], np.float32)
    mixed = colour * np.float32(photometry.saturation)
    mixed += (grey * np.float32(1 - photometry.saturation))[..., None]
    mixed *= photometry.gain * np.float32(4095)
    levels = np.clip(mixed, 0, 4095, out=mixed).astype(np.uint16)
    curve = 255 * (np.arange(4096) / 4095) ** photometry.gamma
    return curve.round().astype(np.uint8)[levels]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A square part of the world, with cars. Fields as in World; cell (0, 0) is its north-west."""

    top: Layer
    paint: UInt16[np.ndarray, "south east"]
    grain: Layer
    crown_top: Layer
    crown_bottom: Layer
    crown: UInt8[np.ndarray, "south east"]
    albedo: Float[np.ndarray, "paint 3"]
    """Colours of the paints in this view's season."""
    floor: Layer
    """`top` without the cars."""
    origin: Float[np.ndarray, "2"]
    """North-west corner, in metres east and south."""


def cut_window(
    rng: np.random.Generator,
    world: World,
    at: Float[np.ndarray, "2"],
    reach: float,
    photometry: Photometry,
    clear: float = 0.0,
) -> Window:
    """Copy the world around `at` (metres east, south) and put cars in it.

    No car stands within `clear` metres. At the world's edge the window is smaller.
    """
    (x0, y0), (x1, y1) = (
        np.clip(np.round((at + side * reach) / CELL), 0, CELLS).astype(int) for side in (-1, 1)
    )
    box = (slice(y0, y1), slice(x0, x1))
    view = Window(
        top=world.top[box].copy(),
        paint=world.paint[box].copy(),
        grain=world.grain[box],
        crown_top=world.crown_top[box],
        crown_bottom=world.crown_bottom[box],
        crown=world.crown[box],
        floor=world.top[box],
        albedo=world.paints.colour * photometry.tint[world.paints.season],
        origin=np.array([x0, y0]) * CELL,
    )
    traffic = rng.uniform(0.5, 1.6)
    slots = world.slots
    near = np.abs(slots[:, :2] - at).max(axis=1) < reach
    near &= np.hypot(*(slots[:, :2] - at).T) >= clear
    near &= rng.random(len(slots)) < slots[:, 3] * traffic
    _park(rng, view, slots[near])
    return view


def _park(rng: np.random.Generator, view: Window, slots: Float[np.ndarray, "car 4"]) -> None:
    """Put cars on what is paved: a body and a cabin, all of one paint; the views add the glass."""
    count, (rows, cols) = len(slots), view.top.shape
    place = slots[:, :2] - view.origin
    heading = slots[:, 2] + rng.normal(0, 0.03, count)
    kind = rng.choice(3, count, p=[0.5, 0.4, 0.1])
    colour = CARS + rng.integers(16, size=count)
    around = np.arange(-6, 7)
    row = ((place[:, 1] / CELL).astype(int)[:, None] + around)[:, :, None]
    col = ((place[:, 0] / CELL).astype(int)[:, None] + around)[:, None, :]
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    x = (col + 0.5) * CELL - place[:, 0, None, None]
    y = (row + 0.5) * CELL - place[:, 1, None, None]
    cos, sin = np.cos(heading)[:, None, None], np.sin(heading)[:, None, None]
    u, v = x * cos + y * sin, y * cos - x * sin
    long = np.array([2.2, 2.4, 2.7])[kind, None, None]
    body = inside & (np.abs(u) < long) & (np.abs(v) < 1.0)
    car, i, j = np.nonzero(body)
    row, col = row[car, i, 0], col[car, 0, j]
    paved = view.paint[row, col] < Paint.LAWN
    car, i, j, row, col = (part[paved] for part in (car, i, j, row, col))
    cabin = np.abs(u[car, i, j] + 0.3) < 1.45
    height = np.where(cabin, np.array([1.45, 1.5, 2.0])[kind[car]], 0.8)
    view.paint[row, col] = colour[car]
    view.top[row, col] = view.floor[row, col] + height.astype(np.float32)


def trace_sunlight(surface: Layer, sun: Float[np.ndarray, "3"], cell: float, reach: float) -> Layer:
    """1 where the sun reaches a surface, 0 in shadow, soft between; cells of `cell` metres.

    Looks up to `reach` metres toward the sun.
    """
    flat = float(np.hypot(sun[0], sun[1]))
    climb = float(sun[2]) / flat
    east, south = float(sun[0]) / flat, float(sun[1]) / flat
    rows, cols = surface.shape
    blocked = np.full(surface.shape, -1000, np.float32)
    steps = np.unique(np.concatenate([np.arange(1, 6) * cell, np.arange(3.5, reach, 1.0)]))
    for distance in steps:
        dr, dc = round(south * distance / cell), round(east * distance / cell)
        here = (slice(max(-dr, 0), rows - max(dr, 0)), slice(max(-dc, 0), cols - max(dc, 0)))
        there = (slice(max(dr, 0), rows - max(-dr, 0)), slice(max(dc, 0), cols - max(-dc, 0)))
        over = surface[there] - np.float32(distance * climb)
        np.maximum(blocked[here], over, out=blocked[here])
    return np.clip(1 - (blocked - surface - 0.05) * 2.5, 0, 1)


def shade_slopes(surface: Layer, sun: Float[np.ndarray, "3"], cell: float) -> Layer:
    """Cosine between the surface's normal and the sun, 0 to 1."""
    east = np.empty_like(surface)
    south = np.empty_like(surface)
    east[:, 1:-1] = surface[:, 2:] - surface[:, :-2]
    south[1:-1] = surface[2:] - surface[:-2]
    east[:, [0, -1]], south[[0, -1]] = 0, 0
    # Steeper than about 60 degrees is a wall, which an upright view does not see.
    east = np.clip(east / (2 * cell), -1.7, 1.7)
    south = np.clip(south / (2 * cell), -1.7, 1.7)
    cosine = sun[2] - east * sun[0] - south * sun[1]
    cosine /= np.sqrt(1 + east * east + south * south)
    return np.maximum(cosine, 0, out=cosine)


def apply_light(
    albedo: Colour, sunlight: Float[np.ndarray, "..."], photometry: Photometry
) -> Colour:
    """Colour under sky and sun; `sunlight` is 0 in shadow, 1 on flat ground in the sun."""
    sky = np.array([0.86, 0.95, 1.14], np.float32) * np.float32(1 - photometry.direct)
    sun = np.array([1.34, 1.25, 1.08], np.float32) * np.float32(photometry.direct)
    return albedo * (sky + sun * sunlight[..., None])


def add_crowns(view: Window) -> tuple[Layer, Bool[np.ndarray, "south east"]]:
    """The surface that the sky sees, and where it is a crown."""
    crown = view.crown_top > view.top
    return np.where(crown, view.crown_top, view.top), crown
