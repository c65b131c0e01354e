"""The page of `cvmatch locate`: photos beside a map of the tiles that were found for them.

Leaflet is part of the page (leaflet/LICENSE: BSD, 2 clauses), so that nothing is loaded from
elsewhere, unless a background map is named.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from cvmatch.data import images, schema, storage
from cvmatch.report.examples import Pictures, read_pictures
from cvmatch.report.page import encode_uri
from cvmatch.search.files import RankedTile, SearchResult, read_coordinates

COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17a2b8")
"""Of photos; the ninth has the first one's again."""

OUTLINE = "geometry"
"""Column of a tile's outline, as `cvmatch gallery` writes it (WKB)."""


def write_map_page(
    results: Sequence[SearchResult],
    output: str,
    tiles: str = "",
    basemap: str = "",
    attribution: str = "",
) -> str:
    """Write the page to a file, whole or not at all; return its location.

    Args:
        results: one for each photo.
        output: location of the file.
        tiles: URI of rows with the tiles' pictures, and outlines where they are to lie on the map.
        basemap: address of a background map's tiles, with {z}, {x} and {y}; empty: none.
        attribution: to whom the background map is due.
    """
    storage.write_text(output, render_map_page(results, tiles, basemap, attribution))
    return output


def render_map_page(
    results: Sequence[SearchResult], tiles: str = "", basemap: str = "", attribution: str = ""
) -> str:
    """Return the page as one HTML document; see `write_map_page`."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 (only where a page is made)
    from markupsafe import Markup  # noqa: PLC0415

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    parts = resources.files("cvmatch.report")
    names = {tile["tile"] for result in results for tile in result.tiles}
    known = read_pictures(tiles, names, (schema.AERIAL, OUTLINE)) if tiles else {}
    photos = [_describe_photo(number, result, known) for number, result in enumerate(results)]
    found = [
        {"number": one["number"], "name": one["name"], "color": one["color"], "tiles": one["tiles"]}
        for one in photos
    ]
    return environment.from_string(parts.joinpath("map.html").read_text("utf-8")).render(
        summary=_summarise(results),
        photos=photos,
        found=found,
        basemap=basemap,
        attribution=attribution,
        leaflet_css=Markup(parts.joinpath("leaflet", "leaflet.css").read_text("utf-8")),
        leaflet_js=Markup(parts.joinpath("leaflet", "leaflet.js").read_text("utf-8")),
    )


def _summarise(results: Sequence[SearchResult]) -> str:
    searched = [result for result in results if result.error is None]
    placed = sum(any(tile["latitude"] is not None for tile in one.tiles) for one in searched)
    text = f"{len(searched)} of {len(results)} photos searched."
    if placed < len(searched):
        text += f" The tiles of {len(searched) - placed} have no positions, and are not on the map."
    return text


def _describe_photo(number: int, result: SearchResult, known: Pictures) -> dict[str, Any]:
    made: dict[str, str | None] = {}
    if synthetic := result.pictures.get(schema.SYNTHETIC):
        made["A, the aerial view painted from it"] = encode_uri(
            images.decode(synthetic), "synthetic"
        )
    if classes := result.pictures.get(schema.SYNTHETIC_CLASSES):
        colors = images.colours_of(images.decode_ids(classes))
        made["S, its map of classes"] = encode_uri(colors, "classes")
    ground = result.pictures.get(schema.GROUND)
    return {
        "number": number,
        "name": result.query,
        "color": COLORS[number % len(COLORS)],
        "error": result.error,
        "read": str(result.read or ""),
        "absent": result.absent,
        "picture": encode_uri(images.decode(ground), "ground") if ground else "",
        "made": made,
        "tiles": [_describe_tile(tile, known.get(tile["tile"], {})) for tile in result.tiles],
    }


def _describe_tile(tile: RankedTile, known: Mapping[str, Any]) -> dict[str, Any]:
    picture = known.get(schema.AERIAL)
    return {
        "rank": tile["rank"],
        "name": tile["tile"],
        "score": tile["score"],
        "probability": tile["probability"],
        "place": read_coordinates(tile),
        "picture": encode_uri(images.decode(picture), "answer") if picture else "",
        "bounds": _read_bounds(known.get(OUTLINE)),
    }


def _read_bounds(outline: bytes | None) -> list[list[float]] | None:
    """Return south-west and north-east of a polygon in WKB (OGC 06-103r4), as `gallery` writes."""
    if not outline:
        return None
    order = "<" if outline[0] == 1 else ">"
    kind, rings, count = (int(n) for n in np.frombuffer(outline, f"{order}u4", 3, 1))
    if kind != 3 or rings != 1:  # not one polygon without holes
        return None
    points = np.frombuffer(outline, f"{order}f8", 2 * count, 13).reshape(count, 2)
    (west, south), (east, north) = points.min(0).tolist(), points.max(0).tolist()
    return [[south, west], [north, east]]
