"""Pairs of photos and tiles: each tile is where its photo was taken, and the splits lie apart."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags

from cvmatch.data import images, storage
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.gallery import pairs
from cvmatch.gallery.cutting import Cutter
from cvmatch.gallery.grid import Cells, Grid, square_at
from cvmatch.gallery.pairs import ON_BORDER, Photo, Step, choose_split, list_photos, make_step
from cvmatch.gallery.settings import MakePairs
from tests.helpers import imagery
from tests.helpers.cvusa import picture, put
from tests.helpers.own_pairs import pad_to_sphere, write_table
from tests.helpers.photo import exif_of, save

BAND = np.random.default_rng(0).integers(0, 255, (64, 1, 3), np.uint8) + np.zeros(
    (64, 352, 3), np.uint8
)
METRES = 30.0


@pytest.fixture(scope="module")
def mosaic() -> imagery.Mosaic:
    return imagery.draw_mosaic(across=8)


@pytest.fixture(scope="module")
def location(mosaic, tmp_path_factory) -> str:
    return imagery.write_pmtiles(mosaic, tmp_path_factory.mktemp("imagery") / "city.pmtiles")


def settings(location: str, folder: Path, **changes) -> MakePairs:
    usual = {"metres": METRES, "size": 64, "block_metres": 60.0, "val_share": 0.4}
    photos, output = str(folder / "photos"), str(folder / "pairs")
    return MakePairs(imagery=location, photos=photos, output=output, **(usual | changes))


def places(mosaic: imagery.Mosaic, count: int) -> list[tuple[float, float]]:
    west, south, east, north = mosaic.bounds
    draw = np.random.default_rng(1).uniform(0.15, 0.85, (count, 2))
    return [(south + (north - south) * y, west + (east - west) * x) for y, x in draw.tolist()]


def cutter(location: str) -> Cutter:
    return Cutter(location, "pmtiles", Grid(METRES, 0.0), 64, None)


def step(config: MakePairs, *photos: Photo) -> Step:
    return Step(config, cutter(config.imagery), photos, f"{config.output}/record.json")


def degrees(value: float) -> tuple[float, float, float]:
    minutes = abs(value) % 1 * 60
    return float(int(abs(value))), float(int(minutes)), minutes % 1 * 60


@pytest.mark.parametrize("latitude", [-60.2, 0.0, 46.95, 70.0])
def test_square_at_a_cells_middle_is_the_cell(latitude):
    grid = Grid(METRES, 0.5)
    cell = grid.cell_at(latitude, 7.44)
    north, east = (one.item() for one in grid.middles(cell))
    assert abs(north - latitude) < 1e-4
    np.testing.assert_allclose(square_at(north, east, METRES), grid.boxes(cell)[0], atol=1e-9)
    near = grid.cell_at(north + 2e-5, east - 2e-5)
    assert (near.row.item(), near.column.item()) == (cell.row.item(), cell.column.item())


def test_tile_is_that_of_a_gallery_with_its_middle_at_the_photo(location, mosaic):
    cut = cutter(location)
    cell = cut.grid.cell_at(*places(mosaic, 1)[0])
    latitude, longitude = (one.item() for one in cut.grid.middles(cell))
    picture, shown = cut.cut_at(latitude, longitude)
    (expected,) = cut.cut(Cells(cell.row, cell.column))
    assert not isinstance(expected, str)
    # A box is rounded to 1 / 256 of a pixel, from a place that has gone through the table.
    assert np.abs(picture.astype(int) - expected).max() <= 2
    assert shown == pytest.approx(1.0)


def test_splits_are_whole_squares_with_a_gap_between_them(location, tmp_path, mosaic):
    config = settings(location, tmp_path, block_metres=200.0)
    west, south, east, north = mosaic.bounds
    grid = np.stack(np.meshgrid(np.linspace(south, north, 90), np.linspace(west, east, 90)), -1)
    splits = np.array([[choose_split(config, tuple(one)) for one in row] for row in grid.tolist()])
    assert set(splits.ravel()) == {"train", "val", ""}
    for a, b in ((splits[1:], splits[:-1]), (splits[:, 1:], splits[:, :-1])):
        assert not ((a == "train") & (b == "val") | (a == "val") & (b == "train")).any()
    only = replace(config, val_share=0.0)
    assert {choose_split(only, tuple(one)) for one in grid[0].tolist()} == {"train"}
    other = replace(config, seed=1)
    coarse = grid[::9, ::9].reshape(-1, 2).tolist()
    assert [choose_split(other, tuple(one)) for one in coarse] != splits[::9, ::9].ravel().tolist()


def test_share_of_the_ground_is_held_out(location, tmp_path):
    config = settings(location, tmp_path, block_metres=METRES * 1.001, val_share=0.3)
    grid = Grid(config.block_metres, 0.0)
    cell = grid.cell_at(46.95, 7.44)
    row, column = (one.ravel() for one in np.meshgrid(np.arange(40), np.arange(40)))
    latitude, longitude = grid.middles(Cells(cell.row + row, cell.column + column))
    splits = [pairs._split_of_square(config, place) for place in zip(latitude, longitude)]  # noqa: B905
    assert splits.count("val") / len(splits) == pytest.approx(0.3, abs=0.04)


def test_place_and_heading_come_from_the_table_else_from_exif(location, tmp_path, mosaic):
    (latitude, longitude), other = places(mosaic, 2)
    exif = exif_of(direction=90)
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitude] = degrees(latitude)
    gps[ExifTags.GPS.GPSLatitudeRef] = "N"
    gps[ExifTags.GPS.GPSLongitude] = degrees(longitude)
    gps[ExifTags.GPS.GPSLongitudeRef] = "E"
    sphere = pad_to_sphere(BAND)
    put(tmp_path / "photos/day/one.jpg", save(sphere, "JPEG", exif=exif))
    put(tmp_path / "photos/two.jpg", save(sphere, "JPEG", exif=exif))
    config = settings(location, tmp_path, val_share=0.0)
    one, two = make_step(step(config, Photo("day/one.jpg"), Photo("two.jpg", other, 0.0)))
    assert (one["latitude"], one["longitude"]) == pytest.approx((latitude, longitude), abs=1e-7)
    assert (two["latitude"], two["longitude"]) == other
    assert (one["pair_id"], one["panorama"], one["tile"]) == (
        "day-one", "panoramas/day-one.png", "tiles/day-one.png",
    )  # fmt: skip
    bands = [
        images.decode(storage.read_bytes(f"{config.output}/{made['panorama']}"))
        for made in (one, two)
    ]
    assert np.array_equal(bands[0], np.roll(bands[1], 88, axis=1))  # a quarter of the turn
    tile = images.decode(storage.read_bytes(f"{config.output}/{two['tile']}"))
    assert np.array_equal(tile, cutter(location).cut_at(*other)[0])


@pytest.mark.parametrize(
    ("photo", "reason"),
    [
        (Photo("good.png"), "its EXIF has no place"),
        (Photo("absent.png", (46.95, 7.44)), "no such file"),
        (Photo("text.jpg", (46.95, 7.44)), "not a PNG"),
        (Photo("flat.jpg", (46.95, 7.44)), "no panorama of a whole turn"),
        (Photo("good.png", (0.0, 7.44)), "the imagery shows 0% of its tile"),
        (Photo("../good.png", (46.95, 7.44)), "leaves the data root"),
    ],
    ids=["nowhere", "gone", "text", "photo", "outside", "above"],
)
def test_photo_that_cannot_be_used_says_why(location, tmp_path, photo, reason):
    put(tmp_path / "photos/good.png", save(pad_to_sphere(BAND), "PNG"))
    put(tmp_path / "photos/text.jpg", b"<html>")
    put(tmp_path / "photos/flat.jpg", picture(size=(40, 30), kind="JPEG"))
    (made,) = make_step(step(settings(location, tmp_path, val_share=0.0), photo))
    assert reason in made["reason"]
    assert made["tile"] == ""


def test_photos_are_listed_below_the_directory_and_names_must_differ(location, tmp_path):
    for name in ("b/two.JPG", "one.png", "._one.png", "notes.txt"):
        put(tmp_path / "photos" / name, b"")
    config = settings(location, tmp_path)
    assert [one.file for one in list_photos(config)] == ["b/two.JPG", "one.png"]
    put(tmp_path / "photos/one.jpg", b"")
    with pytest.raises(ValueError, match=r"names that differ.*one\.jpg and one\.png"):
        list_photos(config)
    with pytest.raises(ValueError, match="expected photos"):
        list_photos(replace(config, photos=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"photo": "a.jpg", "lat": 1, "longitude": 2}], r"\['latitude'\] lack"),
        ([{"photo": "a.jpg", "latitude": 100, "longitude": 2}], r"line 2: expected latitude"),
        ([{"photo": "a.jpg", "latitude": 1, "longitude": 2}] * 2, "each photo once"),
    ],
)
def test_table_of_positions_that_cannot_be_used_is_refused(location, tmp_path, rows, message):
    write_table(tmp_path / "where.csv", rows)
    with pytest.raises(ValueError, match=message):
        list_photos(settings(location, tmp_path, positions=str(tmp_path / "where.csv")))


@pytest.mark.ray
def test_pairs_are_a_data_set_and_the_same_command_makes_no_others(
    ray_session, location, tmp_path, mosaic
):
    rows = []
    for number, (latitude, longitude) in enumerate(places(mosaic, 40)):
        put(tmp_path / f"photos/{number}.png", save(pad_to_sphere(BAND), "PNG"))
        rows.append({"photo": f"{number}.png", "latitude": latitude, "longitude": longitude})
    rows.append({**rows[0], "photo": "gone.png"})
    write_table(tmp_path / "where.csv", rows)
    config = settings(location, tmp_path, positions=str(tmp_path / "where.csv"), block_metres=120.0)
    counts = pairs.make_pairs(config)
    assert sum(counts.values()) == 41
    assert counts["unusable"] + counts["on_border"] == len(
        Path(config.output, "rejected.jsonl").read_text().splitlines()
    )
    assert counts["on_border"] > 0
    reasons = [json.loads(line)["reason"] for line in
               Path(config.output, "rejected.jsonl").read_text().splitlines()]  # fmt: skip
    assert set(reasons) == {ON_BORDER, "no such file"}
    found = {
        split: PairDataset.open(Ingest(root=config.output, split=split))
        for split in ("train", "val")
    }
    assert {split: one.count for split, one in found.items()} == {
        split: counts[split] for split in found
    }
    assert min(counts["train"], counts["val"]) > 0
    before = Path(config.output, "train.csv").read_bytes()
    Path(config.output, "train.csv").unlink()
    for path in Path(config.photos).iterdir():
        path.unlink()  # all are made already
    assert pairs.make_pairs(config) == counts
    assert Path(config.output, "train.csv").read_bytes() == before
    with pytest.raises(ValueError, match="expected pairs made from these photos"):
        pairs.make_pairs(replace(config, metres=METRES + 1))
    again = pairs.make_pairs(replace(config, val_share=0.0))  # cuts none again
    assert (again["train"], again["val"], again["unusable"]) == (40, 0, 1)
