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
    inner = replace(config, metres=0.01)  # whose tiles reach into no other square
    places = zip(latitude.tolist(), longitude.tolist(), strict=True)
    splits = [choose_split(inner, place) for place in places]
    assert splits.count("val") / len(splits) == pytest.approx(0.3, abs=0.04)


def test_square_at_the_antimeridian_is_one_and_the_same(location, tmp_path):
    for row in np.linspace(-50, 50, 40):
        config = settings(location, tmp_path, block_metres=5000.0)
        assert len({choose_split(config, (row, side)) for side in (-180.0, 180.0)}) == 1


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
        (Photo("../good.png", (46.95, 7.44)), "leaves the data root"),
    ],
    ids=["nowhere", "gone", "text", "photo", "above"],
)
def test_photo_that_cannot_be_used_says_why(location, tmp_path, photo, reason):
    put(tmp_path / "photos/good.png", save(pad_to_sphere(BAND), "PNG"))
    put(tmp_path / "photos/text.jpg", b"<html>")
    put(tmp_path / "photos/flat.jpg", picture(size=(40, 30), kind="JPEG"))
    (made,) = make_step(step(settings(location, tmp_path, val_share=0.0), photo))
    assert reason in made["reason"]
    assert made["tile"] == ""


def test_photo_outside_the_imagery_has_no_tile_and_is_not_at_fault(location, tmp_path):
    put(tmp_path / "photos/good.png", save(pad_to_sphere(BAND), "PNG"))
    photo = Photo("good.png", (0.0, 7.44))
    (made,) = make_step(step(settings(location, tmp_path, val_share=0.0), photo))
    assert (made["reason"], made["tile"], made["shown"]) == ("", "", 0.0)


def test_photo_that_changed_or_could_not_be_used_is_looked_at_again(location, tmp_path, mosaic):
    first, second = places(mosaic, 2)
    config = settings(location, tmp_path, val_share=0.0)
    photos = [Photo("one.png", first, 0.0), Photo("two.png", second, 0.0)]
    put(tmp_path / "photos/one.png", save(pad_to_sphere(BAND), "PNG"))
    one, two = make_step(step(config, *photos))
    assert (one["reason"], two["reason"]) == ("", "no such file")
    band = images.decode(storage.read_bytes(f"{config.output}/{one['panorama']}"))
    put(tmp_path / "photos/two.png", save(pad_to_sphere(BAND), "PNG"))  # mended
    brighter = np.clip(BAND.astype(int) + 9, 0, 255).astype(np.uint8)[:, ::-1]
    put(tmp_path / "photos/one.png", save(pad_to_sphere(brighter), "PNG", optimize=True))
    one, two = make_step(step(config, *photos))
    assert (one["reason"], two["reason"]) == ("", "")
    again = images.decode(storage.read_bytes(f"{config.output}/{one['panorama']}"))
    assert not np.array_equal(again, band)


@pytest.mark.parametrize("name", ["day\\one.jpg", "day/./one.jpg", "day/one"])
def test_names_of_photos_become_names_of_files_that_are_found(
    location, tmp_path, mosaic, name, caplog
):
    put(tmp_path / "photos/day/one.jpg", save(pad_to_sphere(BAND), "JPEG"))
    put(tmp_path / "photos/day/one", save(pad_to_sphere(BAND), "JPEG"))
    config = settings(location, tmp_path, val_share=0.0)
    (made,) = make_step(step(config, Photo(name, places(mosaic, 1)[0], 0.0)))
    assert (made["pair_id"], made["reason"]) == ("day-one", "")
    assert Path(config.output, made["panorama"]).is_file()
    assert Path(config.output, made["tile"]).is_file()


def test_imagery_that_cannot_be_used_is_no_fault_of_the_photos(location, tmp_path, mosaic):
    put(tmp_path / "photos/one.png", save(pad_to_sphere(BAND), "PNG"))
    with pytest.raises(ValueError, match="zoom"):
        pairs.make_pairs(settings(location, tmp_path, zoom=40))
    gone = settings(str(tmp_path / "gone.pmtiles"), tmp_path)
    with pytest.raises(FileNotFoundError):
        make_step(step(gone, Photo("one.png", places(mosaic, 1)[0])))
    assert not Path(gone.output, "record.json").exists()


def test_tables_of_a_person_are_not_replaced(location, tmp_path):
    put(tmp_path / "photos/one.png", save(pad_to_sphere(BAND), "PNG"))
    write_table(tmp_path / "pairs/val.csv", [{"panorama": "one.jpg", "tile": "x.png"}])
    with pytest.raises(ValueError, match=r"no tables that cvmatch pairs.*\['val\.csv'\]"):
        pairs.make_pairs(settings(location, tmp_path))
    assert "one.jpg" in (tmp_path / "pairs/val.csv").read_text()


def test_photos_are_listed_below_the_directory_and_names_must_differ(location, tmp_path):
    for name in ("b/two.JPG", "one.png", "_DSC1.jpg", "._one.png", "notes.txt"):
        put(tmp_path / "photos" / name, b"")
    config = settings(location, tmp_path)
    assert [one.file for one in list_photos(config)] == ["_DSC1.jpg", "b/two.JPG", "one.png"]
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
    with pytest.raises(
        ValueError, match=r"1 of 41 photos cannot be used, at most 0%.*no such file"
    ):
        pairs.make_pairs(replace(config, max_rejected=0.0))
    assert not Path(config.output, "train.csv").exists()
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
    with pytest.raises(ValueError, match="expected pairs of val, got none"):
        pairs.make_pairs(replace(config, val_share=1e-9))
    assert Path(config.output, "train.csv").read_bytes() == before  # of one division, or none
    again = pairs.make_pairs(replace(config, val_share=0.0))  # cuts none again
    assert (again["train"], again["val"], again["unusable"]) == (40, 0, 1)
    assert PairDataset.open(Ingest(root=config.output, split="train")).count == 40


@pytest.mark.ray
def test_band_that_says_where_it_looks_is_turned_once(ray_session, location, tmp_path, mosaic):
    (latitude, longitude) = places(mosaic, 1)[0]
    turned = np.roll(BAND, 30, axis=1)
    turned[:, 100:120] = 250
    put(tmp_path / "photos/one.png", save(turned, "PNG", exif=exif_of(direction=90)))
    row = {"photo": "one.png", "latitude": latitude, "longitude": longitude, "heading": 0}
    write_table(tmp_path / "where.csv", [row])
    pairs.make_pairs(
        settings(location, tmp_path, positions=str(tmp_path / "where.csv"), val_share=0.0)
    )
    dataset = PairDataset.open(Ingest(root=str(tmp_path / "pairs"), split="train"))
    (read,) = dataset.rows().take_all()
    assert np.array_equal(images.decode(read["ground"]), turned)
