"""What a search found, as text, GeoJSON, KML and CSV: each tile once, with its place."""

import csv
import io
import json
from xml.etree import ElementTree

import pytest

from cvmatch.search import places
from cvmatch.search.files import RankedTile, SearchResult


def tile(rank: int, name: str, place: tuple[float, float] | None, p: float | None) -> RankedTile:
    latitude, longitude = place or (None, None)
    return RankedTile(
        query="a & b.jpg", rank=rank, tile=name, score=0.9 - rank / 10, probability=p, branches={},
        latitude=latitude, longitude=longitude, modality="G", heading=None, read="",
    )  # fmt: skip


@pytest.fixture
def results() -> list[SearchResult]:
    tiles = [tile(1, "one", (46.9, 7.4), 0.91), tile(2, "two", None, 0.04)]
    return [
        SearchResult("a & b.jpg", tiles=tiles, absent=0.05),
        SearchResult("broken.jpg", error="not a picture"),
    ]


def test_text_has_a_line_for_each_tile_and_says_what_is_not_there(results):
    first, second = (places.to_text(result) for result in results)
    assert "46.90000 7.40000  tile one  p 0.91" in first
    assert "tile two  p 0.04" in first
    assert first.endswith("not in this index: p 0.05")
    assert second == "broken.jpg  not a picture"


def test_text_without_calibration_shows_scores(results):
    bare = SearchResult("c.jpg", tiles=[tile(1, "one", None, None)])
    assert "tile one  score 0.800" in places.to_text(bare)
    assert "not in this index" not in places.to_text(bare)


def test_geojson_has_points_of_the_tiles_with_places_longitude_first(results):
    (feature,) = json.loads(places.to_geojson(results))["features"]
    assert feature["geometry"] == {"type": "Point", "coordinates": [7.4, 46.9]}
    assert feature["properties"]["tile"] == "one"
    assert feature["properties"]["probability"] == 0.91
    assert feature["properties"]["not_in_index"] == 0.05


def test_kml_has_a_folder_for_each_photo_and_escapes_names(results):
    root = ElementTree.fromstring(places.to_kml(results))
    names = [one.text for one in root.iterfind(f".//{{{places.KML}}}Folder/{{{places.KML}}}name")]
    assert names == ["a & b.jpg", "broken.jpg"]
    (point,) = root.iterfind(f".//{{{places.KML}}}coordinates")
    assert point.text == "7.4,46.9"


def test_csv_has_a_row_for_each_tile_and_for_a_photo_without_any(results):
    rows = list(csv.DictReader(io.StringIO(places.to_csv(results))))
    assert [row["tile"] for row in rows] == ["one", "two", ""]
    assert [row["latitude"] for row in rows] == ["46.9", "", ""]
    assert {row["query"] for row in rows} == {"a & b.jpg", "broken.jpg"}
