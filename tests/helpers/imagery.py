"""A small mosaic of Web Mercator, stored in every way in which imagery is."""

import io
import json
import math
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from pmtiles.tile import Compression, TileType, zxy_to_tileid
from pmtiles.writer import Writer
from rasterio import warp
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

HALF_M = 20_037_508.342789244
TILE = 256


@dataclass(frozen=True)
class Mosaic:
    """Map tiles of one zoom, as one picture."""

    pixels: np.ndarray
    """uint8, height x width x 3 (or 4, with opacity), whole tiles."""
    left: int
    """Column of its first tile, as in XYZ."""
    top: int
    """Row of its first tile."""
    zoom: int = 19

    @property
    def resolution(self) -> float:
        return 2 * HALF_M / (TILE * 2**self.zoom)

    @property
    def transform(self) -> Affine:
        west = self.left * TILE * self.resolution - HALF_M
        north = HALF_M - self.top * TILE * self.resolution
        return Affine(self.resolution, 0, west, 0, -self.resolution, north)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north in degrees."""
        right = self.left + self.pixels.shape[1] // TILE
        bottom = self.top + self.pixels.shape[0] // TILE
        west, east = (column / 2**self.zoom * 360 - 180 for column in (self.left, right))
        return west, self._latitude(bottom), east, self._latitude(self.top)

    def _latitude(self, row: int) -> float:
        return math.degrees(math.atan(math.sinh(math.pi * (1 - 2 * row / 2**self.zoom))))

    def tiles(self) -> dict[tuple[int, int], np.ndarray]:
        """The tiles by column and row."""
        height, width = self.pixels.shape[:2]
        return {
            (self.left + x, self.top + y): self.pixels[
                y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE
            ]
            for x in range(width // TILE)
            for y in range(height // TILE)
        }

    def at(self, latitude: float) -> "Mosaic":
        """The same picture elsewhere on its meridian."""
        row = tile_row(latitude, self.zoom)
        return replace(self, top=row - self.pixels.shape[0] // TILE // 2)


def tile_row(latitude: float, zoom: int) -> int:
    y = math.asinh(math.tan(math.radians(latitude)))
    return int((1 - y / math.pi) / 2 * 2**zoom)


def draw_mosaic(across: int = 4, latitude: float = 46.95, zoom: int = 19) -> Mosaic:
    """A picture without symmetry, smooth but for a few blocks, near a longitude of 7.44."""
    y, x = np.mgrid[: across * TILE, : across * TILE].astype(np.float64)
    waves = [
        127 + 80 * np.sin(x / 31 + y / 77) + 40 * np.cos(y / 19),
        127 + 120 * np.sin(x / 53 - y / 41),
        (x * 0.11 + y * 0.07) % 255,
    ]
    pixels = np.clip(np.stack(waves, axis=2), 0, 255).astype(np.uint8)
    pixels[300:340, 500:600] = (250, 10, 30)
    left = int((7.44 + 180) / 360 * 2**zoom)
    return Mosaic(pixels, left, tile_row(latitude, zoom) - across // 2, zoom)


def transform(source: str, target: str, xs: Any, ys: Any) -> tuple[np.ndarray, np.ndarray]:
    """Places in another projection, by PROJ."""
    moved: Any = warp.transform(source, target, xs, ys)
    return np.array(moved[0]), np.array(moved[1])


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_folder(mosaic: Mosaic, folder: Path, from_south: bool = False, kind: str = "PNG") -> str:
    for (column, row), pixels in mosaic.tiles().items():
        row = 2**mosaic.zoom - 1 - row if from_south else row  # noqa: PLW2901
        path = folder / str(mosaic.zoom) / str(column) / f"{row}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, kind))
    return str(folder)


def write_mbtiles(mosaic: Mosaic, path: Path) -> str:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE metadata (name text, value text)")
    database.execute("INSERT INTO metadata VALUES ('format', 'png')")
    columns = "zoom_level integer, tile_column integer, tile_row integer, tile_data blob"
    database.execute(f"CREATE TABLE tiles ({columns})")
    for (column, row), pixels in mosaic.tiles().items():
        key = (mosaic.zoom, column, 2**mosaic.zoom - 1 - row)
        database.execute("INSERT INTO tiles VALUES (?, ?, ?, ?)", (*key, encode(pixels)))
    database.execute("CREATE UNIQUE INDEX places ON tiles (zoom_level, tile_column, tile_row)")
    database.commit()
    database.close()
    return str(path)


def write_pmtiles(mosaic: Mosaic, path: Path, kind: TileType = TileType.PNG) -> str:
    tiles = {zxy_to_tileid(mosaic.zoom, *at): tile for at, tile in mosaic.tiles().items()}
    west, south, east, north = (round(side * 1e7) for side in mosaic.bounds)
    with path.open("wb") as file:
        writer = Writer(file)
        for number in sorted(tiles):
            writer.write_tile(number, encode(tiles[number], kind.name))
        header: Any = {
            "tile_type": kind,
            "tile_compression": Compression.NONE,
            "min_lon_e7": west, "min_lat_e7": south, "max_lon_e7": east, "max_lat_e7": north,
        }  # fmt: skip
        writer.finalize(header, {})
    return str(path)


def write_tiff(mosaic: Mosaic, path: Path, alpha: bool = True, **options: Any) -> str:
    """A COG; `options` are of the file, such as `nodata`. A fourth band is opacity or unnamed."""
    bands = mosaic.pixels.transpose(2, 0, 1)
    profile = {
        "driver": "COG", "crs": "EPSG:3857", "transform": mosaic.transform, "count": len(bands),
        "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype,
        "overviews": "NONE",
    } | options  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        if len(bands) == 4:
            fourth = ColorInterp.alpha if alpha else ColorInterp.undefined
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, fourth]
        file.write(bands)
    return str(path)


def write_all(mosaic: Mosaic, folder: Path) -> dict[str, str]:
    """By the name of the format."""
    return {
        "xyz": write_folder(mosaic, folder / "tiles"),
        "tms": write_folder(mosaic, folder / "from-south", from_south=True),
        "mbtiles": write_mbtiles(mosaic, folder / "city.mbtiles"),
        "pmtiles": write_pmtiles(mosaic, folder / "city.pmtiles"),
        "raster": write_tiff(mosaic, folder / "city.tif"),
    }


def write_region(path: Path, *boxes: tuple[float, float, float, float]) -> str:
    """GeoJSON of boxes of west, south, east and north."""
    rings = [[[w, s], [e, s], [e, n], [w, n], [w, s]] for w, s, e, n in boxes]
    path.write_text(json.dumps({"type": "MultiPolygon", "coordinates": [[r] for r in rings]}))
    return str(path)


def shrink(bounds: tuple[float, float, float, float], share: float) -> Any:
    """A box in the middle of another one."""
    west, south, east, north = bounds
    wide, high = (east - west) * (1 - share) / 2, (north - south) * (1 - share) / 2
    return west + wide, south + high, east - wide, north - high
