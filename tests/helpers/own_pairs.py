"""Pairs of a person's own: tables that name photos and tiles."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.cvusa import put
from tests.helpers.imagery import Mosaic
from tests.helpers.photo import save

HEIGHT, WIDTH = 176, 352
EDGE = (HEIGHT - 64) // 2


def pad_to_sphere(band: np.ndarray) -> np.ndarray:
    """A whole sphere whose middle rows are a band of 64 x 352 pixels."""
    return np.pad(band, ((EDGE, EDGE), (0, 0), (0, 0)), constant_values=90)


def write_table(path: Path, rows: Sequence[Mapping[str, object]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


def write_photos(mosaic: Mosaic, panoramas: Sequence[Path], folder: Path, count: int) -> None:
    """Spheres taken over a mosaic, in `folder`, and the table of their places beside it."""
    west, south, east, north = mosaic.bounds
    rows = []
    for number, (y, x) in enumerate(np.random.default_rng(0).uniform(0.2, 0.8, (count, 2))):
        band = Image.open(panoramas[number % len(panoramas)]).convert("RGB").resize((WIDTH, 64))
        name = f"{number:02d}.jpg"
        put(folder / name, save(pad_to_sphere(np.asarray(band)), "JPEG"))
        place = {"latitude": south + (north - south) * y, "longitude": west + (east - west) * x}
        rows.append({"photo": name, **place, "heading": 6 * number})
    write_table(folder.with_suffix(".csv"), rows)


def write_world(world: Path, root: Path, count: int = 4) -> None:
    """Pairs of the embedded world as spheres that look east, with their tiles."""
    panoramas = sorted((world / "streetview").glob("*.jpg"))
    tiles = {path.stem.removeprefix("input"): path for path in (world / "bingmap").rglob("*.png")}
    for number, split in enumerate(("train", "val")):
        rows = []
        for path in panoramas[number * count : (number + 1) * count]:
            band = np.asarray(Image.open(path).convert("RGB").resize((WIDTH, 64)))
            east = np.roll(band, -WIDTH // 4, axis=1)
            put(root / f"photos/{path.stem}.jpg", save(pad_to_sphere(east), "JPEG"))
            put(root / f"tiles/{path.stem}.png", tiles[path.stem].read_bytes())
            rows.append(
                {
                    "panorama": f"photos/{path.stem}.jpg",
                    "tile": f"tiles/{path.stem}.png",
                    "heading": 90,
                    "latitude": 46.95,
                    "longitude": 7.44,
                }
            )
        write_table(root / f"{split}.csv", rows)
