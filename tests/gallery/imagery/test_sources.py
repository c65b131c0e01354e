"""One mosaic gives the same cells however it is stored, and bad imagery is named."""

import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pmtiles.tile import TileType
from rasterio import warp

from cvmatch.gallery.cutting import Cutter
from cvmatch.gallery.grid import Cells, Grid
from cvmatch.gallery.imagery.sources import detect_format, open_source
from cvmatch.gallery.run import list_cells, survey
from cvmatch.gallery.settings import Format
from tests.helpers import imagery
from tests.helpers.imagery import TILE, Mosaic, draw_mosaic

FORMATS: tuple[Format, ...] = ("xyz", "tms", "mbtiles", "pmtiles", "raster")
GRID = Grid(30.0, 0.5)


@pytest.fixture(scope="module")
def mosaic() -> Mosaic:
    return draw_mosaic()


@pytest.fixture(scope="module")
def files(mosaic, tmp_path_factory) -> dict[str, str]:
    return imagery.write_all(mosaic, tmp_path_factory.mktemp("imagery"))


def cutter(location: str, kind: Format, grid: Grid = GRID, size: int = 128) -> Cutter:
    return Cutter(location, kind, grid, size, None)


def surveyed(cut: Cutter, min_coverage: float = 0.5):
    return survey(cut, list_cells(cut, None), min_coverage, lambda f, parts: list(map(f, parts)))


def pictures(cut: Cutter, cells: Cells) -> np.ndarray:
    return np.stack([one for one in cut.cut(cells) if not isinstance(one, str)])


def warp_plainly(mosaic: Mosaic, box, size: int, samples: int = 8) -> np.ndarray:
    """Restate a cell: points that lie densely in it, taken to the mosaic's pixels by PROJ.

    A mean of the nearest pixels is an area average where the cell's pixels are larger.
    """
    west, south, east, north = box
    xs, ys = imagery.transform("EPSG:4326", "EPSG:3857", [west, east], [south, north])
    steps = (np.arange(size * samples) + 0.5) / (size * samples)
    columns = (xs[0] + steps * (xs[1] - xs[0]) - mosaic.transform.c) / mosaic.resolution
    rows = (mosaic.transform.f - ys[1] + steps * (ys[1] - ys[0])) / mosaic.resolution
    dense = mosaic.pixels[np.floor(rows).astype(int)][:, np.floor(columns).astype(int)]
    return dense.reshape(size, samples, size, samples, 3).astype(float).mean(axis=(1, 3))


@pytest.mark.parametrize("kind", FORMATS)
def test_cells_are_the_same_from_every_format(kind, files):
    first = cutter(files["xyz"], "xyz")
    cells = list_cells(first, None)
    other = cutter(files[kind], kind)
    assert first.grid.ids(list_cells(other, None)) == first.grid.ids(cells)
    assert np.array_equal(pictures(other, cells), pictures(first, cells))


def test_cell_shows_what_is_drawn_at_its_place(files, mosaic):
    cut = cutter(files["xyz"], "xyz", size=64)  # 0.47 m a pixel, of imagery of 0.2 m
    cells, _ = surveyed(cut, min_coverage=1.0)
    for box, found in zip(GRID.boxes(cells)[::17], cut.cut(cells)[::17], strict=True):
        expected = warp_plainly(mosaic, box, 64)
        assert np.abs(found - expected).mean() < 0.5
        assert np.quantile(np.abs(found - expected), 0.99) < 4  # single samples of eight differ


@pytest.mark.parametrize("latitude", [0, 47, 70])
def test_metres_a_pixel_are_right_to_a_thousandth(latitude, tmp_path):
    pixels = np.zeros((TILE * 4, TILE * 4, 3), dtype=np.uint8)
    pixels[:, [400, 520], 0] = 255
    pixels[[380, 500], :, 1] = 255
    mosaic = draw_mosaic().at(latitude)
    mosaic = Mosaic(pixels, mosaic.left, mosaic.top, mosaic.zoom)
    x, y = (np.array(pair) + 0.5 for pair in ([400, 520], [380, 500]))
    east, north = (
        mosaic.transform.c + x * mosaic.resolution,
        mosaic.transform.f - y * mosaic.resolution,
    )
    lon, lat = imagery.transform("EPSG:3857", "EPSG:4326", east, north)
    middle = f"+proj=aeqd +lat_0={np.mean(lat):.12f} +lon_0={np.mean(lon):.12f} +datum=WGS84"
    east, north = imagery.transform("EPSG:4326", middle, lon, [lat[1], lat[0]])

    grid = Grid((east[1] - east[0]) * 1.4, 0.9)
    cut = cutter(imagery.write_folder(mosaic, tmp_path), "xyz", grid, 256)
    cells = list_cells(cut, None)
    near = np.hypot(
        *(at - np.mean(to) for at, to in zip(grid.middles(cells), (lat, lon), strict=True))
    )
    found = pictures(cut, cells.take(np.array([near.argmin()])))[0].astype(float)
    for channel, axis, distance in ((0, 0, east[1] - east[0]), (1, 1, north[1] - north[0])):
        line = found[..., channel].mean(axis=axis)
        line = line - line.min()
        halves = line[:128], line[128:]
        first, second = ((one * np.arange(128)).sum() / one.sum() for one in halves)
        assert distance / (second + 128 - first) == pytest.approx(grid.metres / 256, rel=1e-3)


def test_coarsest_level_that_is_fine_enough_is_read(tmp_path):
    mosaic = draw_mosaic()
    imagery.write_folder(mosaic, tmp_path)
    half = Mosaic(mosaic.pixels[::2, ::2], mosaic.left // 2, mosaic.top // 2, mosaic.zoom - 1)
    imagery.write_folder(half, tmp_path)
    for metres, name in ((50, "zoom 19"), (53, "zoom 18"), (200, "zoom 18"), (20, "zoom 19")):
        grid = Grid(float(metres), 0.5)  # at 46.95 degrees zoom 18 is 0.4076 m a pixel
        cut = cutter(str(tmp_path), "xyz", grid, 128)
        assert {cut.source.levels[n].name for n in cut.levels_of(list_cells(cut, None))} == {name}
    fixed = Cutter(str(tmp_path), "xyz", Grid(50.0, 0.5), 128, 18)
    assert surveyed(fixed)[1].levels == ("zoom 18",)
    with pytest.raises(ValueError, match=r"--zoom among \[18, 19\], got 17"):
        surveyed(Cutter(str(tmp_path), "xyz", GRID, 128, 17))


def test_overviews_of_a_raster_are_its_levels(mosaic, tmp_path):
    path = imagery.write_tiff(mosaic, tmp_path / "city.tif", overviews="AUTO", blocksize=256)
    cut = cutter(path, "raster", Grid(60.0, 0.5), 128)
    assert surveyed(cut)[1].levels == ("overview 1",)
    full = Cutter(path, "raster", Grid(60.0, 0.5), 128, 19)
    cells, counts = surveyed(full)
    assert counts.levels == ("full resolution",)
    differ = pictures(cut, cells).astype(int) - pictures(full, cells)
    assert np.abs(differ).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_tiles_of_other_kinds_are_read(kind, mosaic, files, tmp_path):
    other = imagery.write_folder(mosaic, tmp_path, kind=kind)
    first = cutter(files["xyz"], "xyz")
    cells = list_cells(first, None)
    assert np.array_equal(pictures(cutter(other, "xyz"), cells), pictures(first, cells))


def test_format_is_that_of_what_is_there(files, tmp_path):
    assert {kind: detect_format(files[kind]) for kind in FORMATS if kind != "tms"} == {
        "xyz": "xyz", "mbtiles": "mbtiles", "pmtiles": "pmtiles", "raster": "raster"
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="expected imagery"):
        detect_format(str(tmp_path / "absent"))


def test_tiles_counted_from_the_south_are_not_taken_for_xyz(files, mosaic, tmp_path):
    with pytest.raises(ValueError, match=r"edges fit when .* south .* --format tms"):
        detect_format(files["tms"])
    tiles = imagery.write_folder(mosaic, tmp_path / "described", from_south=True)
    Path(tiles, "tilemapresource.xml").write_text("<TileMap/>")
    assert detect_format(tiles) == "tms"


def test_folder_with_holes_leaves_out_and_counts_what_is_missing(mosaic, tmp_path):
    location = imagery.write_folder(mosaic, tmp_path)
    cut = cutter(location, "xyz", Grid(20.0, 0.0), 64)
    whole, _ = surveyed(cut)
    open_source.cache_clear()
    (tmp_path / "19" / str(mosaic.left + 1) / f"{mosaic.top + 1}.png").unlink()
    kept, counts = surveyed(cut)
    hole = Mosaic(mosaic.pixels[:TILE, :TILE], mosaic.left + 1, mosaic.top + 1).bounds
    boxes = Grid(20.0, 0.0).boxes(whole)
    inside = np.all((boxes[:, :2] > hole[:2]) & (boxes[:, 2:] < hole[2:]), axis=1)
    assert counts.outside == inside.sum() > 0
    assert counts.cells + counts.sparse + counts.outside == len(list_cells(cut, None))
    assert counts.sparse > 0
    assert not set(cut.grid.ids(whole.take(inside))) & set(cut.grid.ids(kept))


@pytest.mark.parametrize("form", ["alpha tiles", "alpha band", "nodata"])
def test_unknown_ground_is_left_out_and_black(form, mosaic, tmp_path):
    opacity = np.full((*mosaic.pixels.shape[:2], 1), 255, dtype=np.uint8)
    opacity[:, 600:] = 0
    pixels = np.where(opacity > 0, np.maximum(mosaic.pixels, 1), 0)
    part = Mosaic(np.concatenate([pixels, opacity], axis=2), mosaic.left, mosaic.top)
    if form == "alpha tiles":
        cut = cutter(imagery.write_folder(part, tmp_path), "xyz")
    elif form == "alpha band":
        cut = cutter(imagery.write_tiff(part, tmp_path / "a.tif"), "raster")
    else:
        solid = Mosaic(pixels, mosaic.left, mosaic.top)
        cut = cutter(imagery.write_tiff(solid, tmp_path / "a.tif", nodata=0), "raster")
    every = GRID.within(imagery.shrink(mosaic.bounds, 0.7))
    left, _, right, _ = cut.source.levels[0].locate(GRID.boxes(every)).T
    edge = 600 + (mosaic.left * TILE if form == "alpha tiles" else 0)
    expected = np.clip((edge - left) / (right - left), 0, 1)
    assert cut.measure_coverage(every) == pytest.approx(expected)
    kept, counts = survey(cut, every, 0.5, lambda f, parts: list(map(f, parts)))
    assert counts.outside == (expected == 0).sum() > 0
    assert counts.sparse == ((expected > 0) & (expected < 0.5)).sum() > 0
    assert len(kept) == counts.cells == (expected >= 0.5).sum()
    half = np.flatnonzero((expected > 0.6) & (expected < 0.9))[:1]
    found = pictures(cut, every.take(half))[0]
    at = int(expected[half[0]] * 128)
    assert np.all(found[:, at + 2 :] == 0)
    assert np.all(found[:, : at - 2].max(axis=2) > 0)


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:2056", "EPSG:4326"])
def test_raster_in_another_projection_shows_the_same_ground(crs, mosaic, files, tmp_path):
    with rasterio.open(files["raster"]) as file:
        bands = file.read()
        default: Any = warp.calculate_default_transform(
            file.crs, crs, file.width, file.height, *file.bounds
        )
        shape, width, height = default
        there = np.zeros((3, height, width), dtype=np.uint8)
        warp.reproject(
            bands, there, src_transform=file.transform, src_crs=file.crs, dst_transform=shape,
            dst_crs=crs, resampling=warp.Resampling.bilinear,
        )  # fmt: skip
    profile = {"driver": "GTiff", "crs": crs, "transform": shape, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "o.tif", "w", width=width, height=height, **profile) as file:
        file.write(there)
    first = cutter(files["raster"], "raster")
    middle = imagery.shrink(mosaic.bounds, 0.5)
    cells = GRID.within(middle)
    found = pictures(cutter(str(tmp_path / "o.tif"), "raster"), cells).astype(int)
    differ = np.abs(found - pictures(first, cells))
    assert differ.mean() < 2
    moved = np.abs(np.roll(found, 2, axis=2) - pictures(first, cells))
    assert moved.mean() > 1.5 * differ.mean()


def refuse_tiff(tmp_path: Path, bands: np.ndarray, **options) -> str:
    profile = {
        "driver": "GTiff", "crs": "EPSG:3857", "transform": draw_mosaic().transform,
        "count": len(bands), "height": bands.shape[1], "width": bands.shape[2],
        "dtype": bands.dtype,
    } | options  # fmt: skip
    with rasterio.open(tmp_path / "bad.tif", "w", **profile) as file:
        file.write(bands)
    with pytest.raises(ValueError, match=r"bad\.tif: expected") as caught:
        open_source(str(tmp_path / "bad.tif"), "raster")
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_raster_without_a_projection_is_refused(tmp_path):
    bands = np.zeros((3, 64, 64), dtype=np.uint8)
    assert "a projection" in refuse_tiff(tmp_path, bands, crs=None)
    assert "-a_srs" in refuse_tiff(tmp_path, bands, transform=rasterio.Affine.identity())


def test_raster_of_16_bits_is_refused_with_what_to_do(tmp_path):
    message = refuse_tiff(tmp_path, np.zeros((4, 64, 64), dtype=np.uint16))
    assert "8 bits (uint8), got ['uint16']" in message
    assert "gdal_translate -ot Byte -scale" in message


def test_raster_with_a_palette_is_refused(tmp_path):
    message = refuse_tiff(tmp_path, np.zeros((1, 64, 64), dtype=np.uint8), photometric="palette")
    assert "-expand rgb" in message


def test_fourth_band_that_is_no_alpha_is_not_read(mosaic, files, tmp_path):
    near_infrared = np.zeros((*mosaic.pixels.shape[:2], 1), dtype=np.uint8)
    four = Mosaic(np.concatenate([mosaic.pixels, near_infrared], axis=2), mosaic.left, mosaic.top)
    path = imagery.write_tiff(four, tmp_path / "four.tif", alpha=False)
    first = cutter(files["raster"], "raster")
    cells = list_cells(first, None)
    assert np.array_equal(pictures(cutter(path, "raster"), cells), pictures(first, cells))


def test_grey_raster_is_read_as_grey(mosaic, tmp_path):
    grey = Mosaic(mosaic.pixels[..., :1], mosaic.left, mosaic.top)
    cut = cutter(imagery.write_tiff(grey, tmp_path / "grey.tif"), "raster")
    found = pictures(cut, list_cells(cut, None))
    assert np.array_equal(found[..., 0], found[..., 2])
    assert found.std() > 10


def cut_short(path: str, share: float) -> str:
    """A copy of the first part of a file."""
    data = Path(path).read_bytes()
    short = Path(path).with_name(f"short-{os.path.basename(path)}")
    short.write_bytes(data[: int(len(data) * share)])
    return str(short)


def test_pmtiles_that_are_cut_short_or_something_else_are_refused(files, mosaic, tmp_path):
    size = os.path.getsize(files["pmtiles"])
    with pytest.raises(ValueError, match=rf"expected {size} bytes, .* cut short"):
        open_source(cut_short(files["pmtiles"], 0.6), "pmtiles")
    with pytest.raises(ValueError, match="PMTiles of version 3, got"):
        open_source(cut_short(files["pmtiles"], 0.0001), "pmtiles")
    with pytest.raises(ValueError, match="PMTiles of version 3, got"):
        open_source(files["mbtiles"], "pmtiles")
    path = Path(imagery.write_pmtiles(mosaic, tmp_path / "vector.pmtiles"))
    data = bytearray(path.read_bytes())
    data[99] = TileType.MVT.value
    path.write_bytes(data)
    with pytest.raises(ValueError, match="png, jpeg or webp, got mvt"):
        open_source(str(path), "pmtiles")


def test_mbtiles_that_are_none_or_hold_vectors_are_refused(files, mosaic, tmp_path):
    with pytest.raises(ValueError, match="expected MBTiles"):
        open_source(files["pmtiles"], "mbtiles")
    path = imagery.write_mbtiles(mosaic, tmp_path / "vector.mbtiles")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE metadata SET value = 'pbf'")
    database.close()
    with pytest.raises(ValueError, match="vector tiles"):
        open_source(path, "mbtiles")


def test_file_that_is_no_raster_is_refused(tmp_path):
    (tmp_path / "notes.tif").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.tif: expected a raster that GDAL opens"):
        open_source(str(tmp_path / "notes.tif"), "raster")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a folder of map tiles"):
        open_source(str(tmp_path / "empty"), "xyz")


@pytest.mark.parametrize("broken", ["cut short", "other size", "no picture"])
def test_tile_that_cannot_be_read_fails_its_cells_and_no_others(broken, mosaic, tmp_path):
    location = imagery.write_folder(mosaic, tmp_path)
    cut = cutter(location, "xyz")
    cells, _ = surveyed(cut)
    whole = cut.cut(cells)
    column, row = mosaic.left + 1, mosaic.top + 2
    path = tmp_path / "19" / str(column) / f"{row}.png"
    bad = {
        "cut short": path.read_bytes()[:2000],
        "other size": imagery.encode(mosaic.pixels[:64, :64]),
        "no picture": b"<html>",
    }
    path.write_bytes(bad[broken])
    assert surveyed(cut)[1].cells == len(cells)
    found = cut.cut(cells)
    left, top, right, bottom = cut.source.levels[0].locate(GRID.boxes(cells)).T / TILE
    touch = (
        (right > column - 0.01)
        & (left < column + 1.01)
        & (bottom > row - 0.01)
        & (top < row + 1.01)
    )
    failed = np.array([isinstance(one, str) for one in found])
    assert np.all(touch[failed])
    assert failed.sum() >= 0.9 * touch.sum()
    assert all(f"tile 19/{column}/{row}" in one for one in found if isinstance(one, str))
    assert all(
        np.array_equal(one, other)
        for one, other in zip(found, whole, strict=True)
        if not isinstance(one, str)
    )


def test_imagery_in_an_object_store_is_read_there_or_copied_once(bucket, tmp_path):
    from pyarrow import fs  # noqa: PLC0415 (only where it is used)

    mosaic = draw_mosaic(across=2)
    files = imagery.write_all(mosaic, tmp_path)
    first = cutter(files["xyz"], "xyz")
    cells = GRID.within(imagery.shrink(mosaic.bounds, 0.3))
    for kind in ("xyz", "mbtiles", "pmtiles", "raster"):
        there = f"{bucket}/{os.path.basename(files[kind])}"
        target, path = fs.FileSystem.from_uri(there)
        fs.copy_files(files[kind], path, fs.LocalFileSystem(), target)
        assert detect_format(there) == kind
        assert np.array_equal(pictures(cutter(there, kind), cells), pictures(first, cells))
    copies = [path.name for path in (tmp_path / "cache" / "files").glob("*/*")]
    assert sorted(copies) == ["city.mbtiles", "city.tif"]
    with pytest.raises(ValueError, match="expected a VRT on disk"):
        open_source(f"{bucket}/city.vrt", "raster")
