"""One mosaic as map tiles, MBTiles, PMTiles and COG: whether its cells are equal, and how fast.

Speeds are in seconds of a core (CPU time), which other work on the machine disturbs less; the whole
job, and that of a twentieth of the area, are in seconds of a clock.
"""

import io
import itertools
import json
import math
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
import torch
import torchvision
from _harness import Bench, fill_sizes, parse_flags, write_results
from PIL import Image
from pmtiles.tile import Compression, TileType, zxy_to_tileid
from pmtiles.writer import Writer

from cvmatch.data import images
from cvmatch.demo.procedural.pairs import render_tiles, world_seed
from cvmatch.gallery.cutting import Cutter
from cvmatch.gallery.grid import Grid
from cvmatch.gallery.mercator import HALF_M, tile_bounds, zoom_level
from cvmatch.gallery.run import list_cells, make_gallery
from cvmatch.gallery.settings import Format, MakeGallery

ZOOM, TILE, BLOCK = 19, 256, 512
LEFT, TOP = 272_970, 184_500  # of the mosaic's first tile: near Bern


@dataclass(frozen=True, kw_only=True)
class GalleryBench(Bench):
    """Cut the cells of one mosaic from each format."""

    pixels: int = 0
    """Width and height of the mosaic; 0: 8,192, quick 2,048."""
    cells: int = 0
    """Cells that are compared and timed; 0: 1,000, quick 100."""


def draw_mosaic(pixels: int) -> np.ndarray:
    """Draw places of the embedded world side by side, each moved and so another one every time."""
    drawn = [tile for tile, _ in render_tiles(world_seed(0, 0), 16, BLOCK)]
    mosaic = np.empty((pixels, pixels, 3), dtype=np.uint8)
    across = pixels // BLOCK
    for number, (y, x) in enumerate(itertools.product(range(across), repeat=2)):
        block = np.roll(drawn[number % len(drawn)], (7 * y, 11 * x), axis=(0, 1))
        mosaic[y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK] = block
    return mosaic


def cut_tiles(mosaic: np.ndarray) -> Iterator[tuple[int, int, bytes]]:
    """Column, row and PNG of each map tile."""
    for y, x in itertools.product(range(len(mosaic) // TILE), repeat=2):
        tile = mosaic[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]
        buffer = io.BytesIO()
        Image.fromarray(tile).save(buffer, "PNG")
        yield LEFT + x, TOP + y, buffer.getvalue()


def write_formats(mosaic: np.ndarray, at: str) -> dict[Format, str]:
    """Write the mosaic in every format."""
    tiles = list(cut_tiles(mosaic))
    for column, row, data in tiles:
        os.makedirs(f"{at}/tiles/{ZOOM}/{column}", exist_ok=True)
        with open(f"{at}/tiles/{ZOOM}/{column}/{row}.png", "wb") as file:
            file.write(data)
    _write_mbtiles(tiles, f"{at}/city.mbtiles")
    _write_pmtiles(tiles, len(mosaic) // TILE, f"{at}/city.pmtiles")
    resolution = zoom_level(ZOOM, TILE).x_resolution
    west, north = LEFT * TILE * resolution - HALF_M, HALF_M - TOP * TILE * resolution
    shape = rasterio.Affine(resolution, 0, west, 0, -resolution, north)
    profile = {"driver": "COG", "crs": "EPSG:3857", "transform": shape, "compress": "deflate"}
    size = {"width": len(mosaic), "height": len(mosaic), "count": 3, "dtype": "uint8"}
    with rasterio.open(f"{at}/city.tif", "w", **profile, **size) as file:
        file.write(mosaic.transpose(2, 0, 1))
    return {
        "xyz": f"{at}/tiles",
        "mbtiles": f"{at}/city.mbtiles",
        "pmtiles": f"{at}/city.pmtiles",
        "raster": f"{at}/city.tif",
    }


def _write_mbtiles(tiles: list[tuple[int, int, bytes]], path: str) -> None:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE metadata (name text, value text)")
    database.execute(
        "CREATE TABLE tiles (zoom_level integer, tile_column integer, tile_row integer, "
        "tile_data blob, PRIMARY KEY (zoom_level, tile_column, tile_row))"
    )
    rows = ((ZOOM, column, 2**ZOOM - 1 - row, data) for column, row, data in tiles)
    database.executemany("INSERT INTO tiles VALUES (?, ?, ?, ?)", rows)
    database.commit()
    database.close()


def _write_pmtiles(tiles: list[tuple[int, int, bytes]], across: int, path: str) -> None:
    west, south, east, north = tile_bounds(ZOOM, LEFT, TOP, LEFT + across, TOP + across)
    header: Any = {
        "tile_type": TileType.PNG,
        "tile_compression": Compression.NONE,
        "min_lon_e7": round(west * 1e7),
        "min_lat_e7": round(south * 1e7),
        "max_lon_e7": round(east * 1e7),
        "max_lat_e7": round(north * 1e7),
    }
    with open(path, "wb") as file:
        writer = Writer(file)
        for number, data in sorted((zxy_to_tileid(ZOOM, x, y), data) for x, y, data in tiles):
            writer.write_tile(number, data)
        writer.finalize(header, {})


def time_core(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and the seconds of cores that it took."""
    begin = time.process_time()
    result = call()
    return result, time.process_time() - begin


def measure_tower(size: int) -> float:
    """Tiles a second of a core of the matcher's default tower, VGG16, in fp32."""
    tower = torchvision.models.vgg16(weights=None).features.eval()
    batch = torch.zeros(8, 3, size, size)
    with torch.inference_mode():
        tower(batch)
        return len(batch) / time_core(lambda: tower(batch))[1]


def measure_job(imagery: str, output: str, region: str = "") -> tuple[int, float]:
    """Cells of a whole job, and its seconds by the clock."""
    begin = time.perf_counter()
    made = make_gallery(MakeGallery(imagery=imagery, output=output, region=region))
    return made["rows"], time.perf_counter() - begin


def write_part(cutter: Cutter, path: str, share: float) -> str:
    """Write a region of a share of the imagery's area, in its middle."""
    west, south, east, north = cutter.source.find_bounds()
    wide, high = ((b - a) * (1 - math.sqrt(share)) / 2 for a, b in ((west, east), (south, north)))
    left, bottom, right, top = west + wide, south + high, east - wide, north - high
    ring = [[left, bottom], [right, bottom], [right, top], [left, top], [left, bottom]]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"type": "Polygon", "coordinates": [ring]}, file)
    return path


def measure_format(cutter: Cutter, limit: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return the row of a format, and the pictures of the first cells."""
    cells = list_cells(cutter, None)
    cells = cells.take(np.arange(min(limit, len(cells))))
    _, surveyed = time_core(lambda: cutter.measure_coverage(cells))
    cut, seconds = time_core(lambda: cutter.cut(cells))
    pictures = np.stack([one for one in cut if not isinstance(one, str)])
    _, encoding = time_core(lambda: [images.encode(one) for one in pictures])
    row = {
        "format": cutter.format,
        "survey, ms a cell": 1000 * surveyed / len(cells),
        "cut, ms a cell": 1000 * seconds / len(cells),
        "encode, ms a cell": 1000 * encoding / len(cells),
        "cells/s of a core": len(cells) / (surveyed + seconds + encoding),
    }
    return row, pictures


def main(bench: GalleryBench) -> None:
    """Write all formats, cut the same cells from each, and run whole jobs on one of them."""
    usual = {"pixels": 2048, "cells": 100} if bench.quick else {"pixels": 8192, "cells": 1000}
    bench = fill_sizes(bench, usual)
    with tempfile.TemporaryDirectory() as at:
        files = write_formats(draw_mosaic(bench.pixels), at)
        table, first = [], None
        for kind, location in files.items():
            cutter = Cutter(location, kind, Grid(60.0, 0.5), 256, None)
            row, pictures = measure_format(cutter, bench.cells)
            first = pictures if first is None else first
            table.append(row | {"values that differ": int((pictures != first).sum())})
        tower = measure_tower(256)
        figures = {f"{row['format']}.cells": row["cells/s of a core"] for row in table}
        figures |= {"tower.tiles": tower, "ratio": min(figures.values()) / tower}
        figures |= {"differ": sum(row["values that differ"] for row in table)}
        notes = [
            f"A mosaic of {bench.pixels} x {bench.pixels} pixels of the embedded world at zoom "
            f"{ZOOM}, PNG tiles of {TILE}, COG by deflate; {bench.cells} cells at most, of 60 m, "
            "overlap 0.5, 256 pixels, encoded as PNG. In ms of a core (CPU time). Values of pixels "
            "are compared with those of the first row.",
            f"VGG16 embeds {tower:.2f} tiles of 256 x 256 a second of a core (fp32, features "
            f"alone): the slowest format is {figures['ratio']:.0f} times as fast.",
        ]
        if not bench.quick:
            notes.append(_measure_jobs(files["pmtiles"], at, figures))
    write_results(bench, "Cells of one mosaic from every format", table, figures, notes)


def _measure_jobs(imagery: str, at: str, figures: dict[str, float]) -> str:
    """Run the whole job and that of a twentieth of the area, after a run that starts Ray."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
    cutter = Cutter(imagery, "pmtiles", Grid(60.0, 0.5), 256, None)
    measure_job(imagery, f"{at}/warm", write_part(cutter, f"{at}/warm.json", 0.01))
    part, part_seconds = measure_job(
        imagery, f"{at}/part", write_part(cutter, f"{at}/part.json", 0.05)
    )
    whole, seconds = measure_job(imagery, f"{at}/whole")
    figures |= {"job.cells": whole / seconds, "part.cells": part / whole}
    figures |= {"part.seconds": part_seconds / seconds}
    return (
        f"The whole job from PMTiles, with Ray running already: {whole} cells in {seconds:.0f} s "
        f"by the clock ({whole / seconds:.0f} a second). A region of 5 % of the area: {part} cells "
        f"({part / whole:.1%}) in {part_seconds:.0f} s ({part_seconds / seconds:.1%})."
    )


if __name__ == "__main__":
    main(parse_flags(GalleryBench))
