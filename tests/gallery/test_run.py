"""A gallery's rows: each cell once, what an index takes, the same after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import shapely

from cvmatch import cli
from cvmatch.data import images, schema, tables
from cvmatch.gallery.cutting import Cutter
from cvmatch.gallery.grid import Grid
from cvmatch.gallery.region import read_region
from cvmatch.gallery.run import COLUMNS, OUTLINE, VINTAGE, list_cells, make_gallery
from cvmatch.gallery.settings import MakeGallery
from cvmatch.index.embedding import read_gallery
from cvmatch.index.settings import GalleryConfig
from tests.helpers import imagery

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mosaic() -> imagery.Mosaic:
    return imagery.draw_mosaic(across=8)


@pytest.fixture(scope="module")
def location(mosaic, tmp_path_factory) -> str:
    return imagery.write_pmtiles(mosaic, tmp_path_factory.mktemp("imagery") / "city.pmtiles")


def rows(output: str) -> dict[str, dict]:
    found = [row for one in tables.batches(output, COLUMNS.names) for row in one.to_pylist()]
    by_id = {row[schema.PAIR_ID]: row for row in found}
    assert len(by_id) == len(found), "a row is there twice"
    return by_id


def settings(location: str, output: Path, **changes) -> MakeGallery:
    usual = {"metres": 30.0, "size": 64, "vintage": "2025-06"}
    return MakeGallery(imagery=location, output=str(output), **(usual | changes))


@pytest.fixture(scope="module")
def made(location, tmp_path_factory, ray_session):
    config = settings(location, tmp_path_factory.mktemp("made") / "tiles")
    return config, make_gallery(config), rows(config.output)


@pytest.mark.ray
def test_gallery_holds_each_cell_once_with_its_place_and_outline(made, mosaic):
    config, manifest, found = made
    counts = manifest["config"]["counts"]
    assert manifest["rows"] == counts["cells"] == len(found) > 300
    assert counts["levels"] == ["zoom 19"]
    west, south, east, north = mosaic.bounds
    for row in found.values():
        assert row[schema.ERROR] is None
        assert row[VINTAGE] == "2025-06"
        outline = shapely.from_wkb(row[OUTLINE])
        middle = shapely.Point(row[schema.LONGITUDE], row[schema.LATITUDE])
        assert outline.centroid.distance(middle) < 1e-8
        assert south <= row[schema.LATITUDE] <= north
        assert west <= row[schema.LONGITUDE] <= east
    cut = Cutter(config.imagery, "pmtiles", Grid(30.0, 0.5), 64, None)
    cells = list_cells(cut, None)
    for pair_id, picture in list(zip(cut.grid.ids(cells), cut.cut(cells), strict=True))[::50]:
        if pair_id in found:
            assert np.array_equal(images.decode(found[pair_id][schema.AERIAL]), picture)


@pytest.mark.ray
def test_gallery_is_geoparquet(made):
    for path in Path(made[0].output).glob("*.parquet"):
        geo = json.loads(pq.read_schema(path).metadata[b"geo"])
        assert geo["version"] == "1.1.0"
        assert geo["primary_column"] == OUTLINE
        assert geo["columns"][OUTLINE] == {"encoding": "WKB", "geometry_types": ["Polygon"]}
        assert pq.read_schema(path).equals(COLUMNS)


@pytest.mark.ray
def test_gallery_is_what_an_index_is_built_of(made):
    config, _, found = made
    taken = read_gallery(GalleryConfig(rows=config.output)).take_all()
    assert {row[schema.PAIR_ID]: row[schema.AERIAL] for row in taken} == {
        pair_id: row[schema.AERIAL] for pair_id, row in found.items()
    }


@pytest.mark.ray
def test_gallery_again_keeps_the_output_and_other_settings_are_refused(made):
    config, manifest, _ = made
    before = {p.name: p.stat().st_mtime_ns for p in Path(config.output).iterdir()}
    assert make_gallery(config) == manifest
    after = {p.name: p.stat().st_mtime_ns for p in Path(config.output).glob("*.parquet")}
    assert after.items() <= before.items()
    with pytest.raises(ValueError, match="made from"):
        make_gallery(replace(config, metres=31.0))


@pytest.mark.ray
def test_gallery_of_a_region_holds_its_part_of_the_whole_with_the_same_rows(
    made, mosaic, location, tmp_path
):
    box = imagery.shrink(mosaic.bounds, 0.4)
    region = imagery.write_region(tmp_path / "part.json", box)
    config = settings(location, tmp_path / "tiles", region=region)
    make_gallery(config)
    west, south, east, north = box
    assert rows(config.output) == {
        pair_id: row
        for pair_id, row in made[2].items()
        if west < row[schema.LONGITUDE] < east and south < row[schema.LATITUDE] < north
    }


@pytest.mark.ray
def test_gallery_killed_in_the_middle_goes_on_to_the_same_bytes(location, tmp_path, ray_session):
    whole = settings(location, tmp_path / "whole", metres=15.0, size=128)
    make_gallery(whole)
    begun = replace(whole, output=str(tmp_path / "begun"))
    words = f"--imagery {location} --metres 15 --size 128 --vintage 2025-06 --output {begun.output}"
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "gallery.py"), *words.split()],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(Path(begun.output).glob("*.parquet"))) < 2 and driver.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert driver.poll() is None, "it ended before it was killed"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not Path(begun.output, "manifest.json").exists()
    make_gallery(begun)
    assert rows(begun.output) == rows(whole.output)


@pytest.mark.ray
def test_region_outside_the_imagery_is_refused_with_what_both_span(location, tmp_path, ray_session):
    region = imagery.write_region(tmp_path / "sea.json", (7.5, 46.9, 7.501, 46.901))
    with pytest.raises(ValueError, match=r"longitude 7\.5000 to 7\.5010.*it has longitude 7\.43"):
        make_gallery(settings(location, tmp_path / "tiles", region=region))


@pytest.mark.ray
def test_broken_tile_is_named_and_ends_the_job_only_above_the_share(tmp_path, ray_session):
    mosaic = imagery.draw_mosaic(across=2)
    folder = imagery.write_folder(mosaic, tmp_path / "tiles")
    broken = Path(folder, "19", str(mosaic.left), f"{mosaic.top}.png")
    broken.write_bytes(broken.read_bytes()[:1000])
    config = settings(folder, tmp_path / "out", max_rejected=0.5)
    make_gallery(config)
    named = Path(config.output, "rejected.jsonl").read_text().splitlines()
    assert named
    assert all(f"tile 19/{mosaic.left}/{mosaic.top}" in json.loads(one)["reason"] for one in named)
    assert sum(row[schema.ERROR] is None for row in rows(config.output).values()) > len(named)
    with pytest.raises(ValueError, match=r"expected at most 5% .* rows to fail"):
        make_gallery(settings(folder, tmp_path / "other"))


@pytest.mark.ray
def test_command_says_what_became_of_the_cells(location, tmp_path, capsys, mosaic, ray_session):
    west, south, east, north = mosaic.bounds
    wide = (west, south, east + (east - west), north)
    region = imagery.write_region(tmp_path / "wide.json", wide)
    words = f"--imagery {location} --region {region} --metres 60 --output {tmp_path}/tiles"
    cli.main("gallery", [*words.split(), "--encoding", "jpeg"])
    said = capsys.readouterr()
    answer = json.loads(said.out)
    share = answer["outside"] / (answer["cells"] + answer["outside"] + answer["sparse"])
    assert 0.4 < share < 0.5
    assert (
        f"{answer['cells']} cells of 60 m (0.234 m a pixel, zoom 19), {share:.1%} outside"
        in said.err
    )
    one = next(iter(rows(f"{tmp_path}/tiles").values()))
    assert one[schema.AERIAL][:3] == b"\xff\xd8\xff"
    assert images.decode(one[schema.AERIAL]).shape == (256, 256, 3)


def test_command_without_the_extra_says_what_to_install():
    code = (
        "import sys; sys.modules['pmtiles'] = None; from cvmatch.cli import main; main('gallery')"
    )
    typed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert typed.returncode == cli.WRONG_INPUT
    assert "expected the library pmtiles" in typed.stderr
    assert "pip install cvmatch[geo]" in typed.stderr


def test_imagery_that_is_not_there_is_wrong_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main("gallery", ["--imagery", f"{tmp_path}/absent.pmtiles"])
    assert caught.value.code == cli.WRONG_INPUT
    assert "absent.pmtiles: expected imagery" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"overlap": 1.0}, {"metres": 0.0}, {"min_coverage": 2.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="gallery: expected"):
        MakeGallery(**wrong)


SQUARE = {
    "type": "Polygon",
    "coordinates": [[[7.0, 46.0], [8.0, 46.0], [8.0, 47.0], [7.0, 47.0], [7.0, 46.0]]],
}


@pytest.mark.parametrize(
    "tree",
    [
        SQUARE,
        {"type": "MultiPolygon", "coordinates": [SQUARE["coordinates"]]},
        {"type": "Feature", "geometry": SQUARE, "properties": {}},
        {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": SQUARE}] * 2},
    ],
)
def test_region_is_read_from_every_kind_of_geojson(tree, tmp_path):
    (tmp_path / "area.json").write_text(json.dumps(tree))
    region = read_region(str(tmp_path / "area.json"))
    assert region.bounds == (7.0, 46.0, 8.0, 47.0)
    inside = region.contains(np.array([46.5, 46.5, 48.0]), np.array([7.5, 8.5, 7.5]))
    assert inside.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "GeoJSON of Polygons"),
        ('{"type": "Point", "coordinates": [7, 46]}', "a Point"),
        ('{"type": "FeatureCollection", "features": []}', "in degrees"),
        (json.dumps(SQUARE).replace("46.0", "1200000.0"), "ogr2ogr"),
    ],
)
def test_region_that_is_none_is_refused(text, said, tmp_path):
    (tmp_path / "area.json").write_text(text)
    with pytest.raises(ValueError, match=rf"area\.json: expected.* .*{said}"):
        read_region(str(tmp_path / "area.json"))
