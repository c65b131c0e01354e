"""The page with the map: what it holds, and in a browser, what is drawn."""

import re
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pytest
import shapely
from pyarrow import parquet

from cvmatch.data import images
from cvmatch.report.map_page import render_map_page, write_map_page
from cvmatch.search.files import RankedTile, SearchResult

NAMES = ["tile <1>", "tile 2", "tile 3"]


def tile(rank: int, probability: float | None = 0.5) -> RankedTile:
    return RankedTile(
        query="street.jpg", rank=rank, tile=NAMES[rank - 1], score=1 / rank, branches={},
        probability=probability, latitude=46.9 + rank / 1000, longitude=7.4, modality="G",
        heading=None, read="",
    )  # fmt: skip


def result(**changes) -> SearchResult:
    ground = images.encode(np.zeros((16, 64, 3), np.uint8))
    fields = {
        "pictures": {"ground": ground},
        "tiles": [tile(rank) for rank in (1, 2, 3)],
        "absent": 0.1,
    }
    return SearchResult("street.jpg", **(fields | changes))


@pytest.fixture
def tiles(tmp_path) -> str:
    """Rows of two of the tiles, one with its outline."""
    (tmp_path / "tiles").mkdir()
    picture = images.encode(np.full((8, 8, 3), 90, np.uint8))
    outline = shapely.to_wkb(shapely.box(7.399, 46.900, 7.401, 46.902), byte_order=1)
    rows = {
        "pair_id": NAMES[:2],
        "aerial": [picture, picture],
        "geometry": [outline, None],
    }
    parquet.write_table(pa.table(rows), tmp_path / "tiles" / "part.parquet")
    return str(tmp_path / "tiles")


def test_page_escapes_names_and_loads_nothing_from_elsewhere(tiles):
    page = render_map_page([result()], tiles)
    assert "tile <1>" not in page
    assert "tile &lt;1&gt;" in page
    assert 'src="http' not in page
    assert "tile.openstreetmap" not in page
    assert "p 0.10" in page


def test_page_says_where_there_is_no_calibration_no_place_and_no_answer():
    bare = result(tiles=[tile(1, None) | {"latitude": None, "longitude": None}], absent=None)
    page = render_map_page([bare, SearchResult("broken.jpg", error="not a picture")])
    assert "No probabilities" in page
    assert "have no positions" in page
    assert "Not searched: not a picture" in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 400])
def test_browser_draws_a_mark_for_each_tile_and_the_pictures_with_an_outline(
    tiles, tmp_path, width
):
    page = write_map_page([result()], str(tmp_path / "found.html"), tiles)
    drawn = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{page}"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert len(re.findall(r'<div class="[^"]*leaflet-marker-icon', drawn)) == 3
    assert len(re.findall(r'<img class="[^"]*leaflet-image-layer', drawn)) == 1
