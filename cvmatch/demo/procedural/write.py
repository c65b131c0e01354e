"""Write worlds as a CVUSA directory.

One task of Ray Data a world writes its files; pictures never pass the driver.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import ray.data
from jaxtyping import UInt8

from cvmatch.data import storage
from cvmatch.data.images import colours_of, encode
from cvmatch.demo.procedural.pairs import Pair, Sizes, render_pairs, world_seed
from cvmatch.demo.settings import MakeWorld
from cvmatch.runtime import progress, session

_POLAR = (128, 512)
"""Height and width of CVUSA's polar views, in pixels."""
_METRES = 111_320.0
"""Metres in a degree of latitude."""
Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class _Preset:
    sizes: Sizes
    cameras: int
    train: int
    val: int


_SMALL = Sizes(aerial=128, panorama=(64, 256))
_PRESETS = {
    "tiny": _Preset(sizes=Sizes(aerial=64, panorama=(64, 256)), cameras=6, train=24, val=12),
    "demo": _Preset(sizes=_SMALL, cameras=16, train=960, val=320),
    "standard": _Preset(sizes=_SMALL, cameras=16, train=2000, val=500),
    "large": _Preset(sizes=Sizes(), cameras=16, train=20_000, val=2_000),
}


@dataclass(frozen=True, kw_only=True)
class _WorldPlan:
    """One world of a data set."""

    index: int
    split: Split
    first: int  # id of its first pair
    cameras: int


def make_world(config: MakeWorld) -> dict[str, int]:
    """Write the data set; returns the number of pairs by split. The same config, the same bytes.

    Raises:
        ValueError: `train` or `val` is not positive.
    """
    places = _plan_worlds(config)
    write = partial(_write_world, config, storage.absolute(config.output), places)
    session.start()
    rows = ray.data.range(len(places), override_num_blocks=len(places)).flat_map(write)
    total, written = sum(place.cameras for place in places), []
    with progress.watch("world", total, lambda: len(written)):
        for row in rows.iter_rows():
            written.append((row["pair_id"], row["split"], row["latitude"], row["longitude"]))
    counts = {"train": 0, "val": 0}
    for _, split, _, _ in written:
        counts[split] += 1
    assert len(written) == total, "a world has too few pairs"
    _write_lists(config, sorted(written))
    return counts


def _plan_worlds(config: MakeWorld) -> list[_WorldPlan]:
    preset = _PRESETS[config.preset]
    train = preset.train if config.train is None else config.train
    val = preset.val if config.val is None else config.val
    if min(train, val) < 1:
        raise ValueError(
            f"expected at least 1 pair in each split, got train={train}, val={val}. "
            "Set --train and --val to positive numbers."
        )
    crowd = min(4 * preset.cameras, val) if config.near_gallery else preset.cameras
    places, first = [], 1
    wanted: tuple[tuple[Split, int, int], ...] = (
        ("train", train, preset.cameras),
        ("val", val, crowd),
    )
    for split, count, cameras in wanted:
        for _ in range(math.ceil(count / cameras)):
            places.append(_WorldPlan(index=len(places), split=split, first=first, cameras=cameras))
            first += cameras
    return places


def _write_world(
    config: MakeWorld, root: str, places: list[_WorldPlan], row: dict[str, int]
) -> list[dict[str, str | float]]:
    """Write the files of the world that `row` counts; return a row for each pair."""
    place = places[row["id"]]
    seed = world_seed(config.seed, place.index)
    south, west = _anchor(place.index)
    sizes = _PRESETS[config.preset].sizes
    rows = []
    for camera, pair in enumerate(render_pairs(seed, place.cameras, sizes, config.difficulty)):
        name = f"{place.first + camera:07d}"
        for path, data in _encode_files(config, name, pair):
            storage.write_bytes(storage.join(root, path), data)
        longitude = west + pair.east / (_METRES * math.cos(math.radians(south)))
        rows.append(
            {
                "pair_id": name,
                "split": place.split,
                "latitude": south + pair.north / _METRES,
                "longitude": longitude,
            }
        )
    return rows


def _anchor(index: int) -> tuple[float, float]:
    """Latitude and longitude of a world's south-west corner, in the middle of the Atlantic.

    A grid of 0.05 degrees: 3.5 km or more between worlds, for 120,000 worlds.
    """
    row, column = divmod(index, 200)
    return 20.0 + 0.05 * row, -45.0 + 0.05 * column


def _encode_files(config: MakeWorld, name: str, pair: Pair) -> Iterator[tuple[str, bytes]]:
    """Relative path and content of each file of a pair."""
    colours = colours_of(pair.classes)
    yield f"segmap/output{name}.png", encode(colours)
    if config.layout == "subset":
        yield f"bingmap/input{name}.png", encode(pair.aerial)
        yield f"streetview/{name}.jpg", encode(pair.panorama, "JPEG")
        if config.polar:
            yield f"polarmap/normal/input{name}.png", encode(_polar(pair.aerial))
            yield f"polarmap/segmap/output{name}.png", encode(_polar(colours, nearest=True))
        return
    yield f"bingmap/19/{name}.jpg", encode(pair.aerial, "JPEG")
    yield f"streetview/panos/{name}.jpg", encode(pair.panorama, "JPEG")
    yield f"streetview/annotations/{name}.png", encode(pair.annotation)
    if config.polar:
        yield f"polarmap/19/{name}.png", encode(_polar(pair.aerial))


def _polar(
    tile: UInt8[np.ndarray, "size size 3"], nearest: bool = False
) -> UInt8[np.ndarray, "height width 3"]:
    # Here, because torch takes seconds and 300 MB in every worker, which only polar views need.
    from cvmatch.nn.geometry import to_polar_image  # noqa: PLC0415

    return to_polar_image(tile, *_POLAR, nearest=nearest)


def _write_lists(config: MakeWorld, rows: list[tuple[str, str, float, float]]) -> None:
    """The lists of splits and locations, in the form and with the quirks of CVUSA's own."""
    for split in ("train", "val"):
        names = [name for name, part, _, _ in rows if part == split]
        order = np.random.default_rng([config.seed, len(names)]).permutation(len(names))
        names = [names[position] for position in order]
        path, text = (_subset if config.layout == "subset" else _official)(split, names)
        storage.write_text(storage.join(config.output, path), text)
    places = [f"{lat:.8f},{lon:.8f}" for _, _, lat, lon in rows]
    text = "".join(f"{place},{place},0.0\n" for place in places)
    storage.write_text(storage.join(config.output, "split_locations", "all.csv"), text)


def _subset(split: str, names: list[str]) -> tuple[str, str]:
    # The published lists are like this: CRLF, no last newline in train, and columns 2 and 3 name
    # files that do not exist (an `input` too many, and in val the wrong extension).
    kind = "jpg" if split == "train" else "png"
    views = [(name, f"streetview/input{name}.{kind}") for name in names]
    text = "\r\n".join(f"bingmap/input{name}.png,{view},{view}" for name, view in views)
    return f"{split}-19zl.csv", text if split == "train" else text + "\r\n"


def _official(split: str, names: list[str]) -> tuple[str, str]:
    rows = (
        f"bingmap/19/{name}.jpg,streetview/panos/{name}.jpg,streetview/annotations/{name}.png\n"
        for name in names
    )
    return f"splits/{split}-19zl.csv", "".join(rows)
