"""What a search found -> text for people, and files for maps: GeoJSON, KML, CSV."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from cvmatch.search.files import RankedTile, SearchResult, read_coordinates

KML = "http://www.opengis.net/kml/2.2"
"""Namespace of KML 2.2 (OGC 07-147r2)."""

COLUMNS: tuple[str, ...] = (
    "query", "rank", "tile", "latitude", "longitude", "probability", "score", "not_in_index",
)  # fmt: skip
"""Of the CSV."""


def to_text(result: SearchResult, count: int = 3) -> str:
    """Return what a person reads of a photo: what was read of it, and the first tiles.

    `IMG_0412.jpg  sphere 5376 x 2688, heading 225.0 (XMP)`, then a line for each tile.
    """
    lines = [f"{result.query}  {result.error or result.read}"]
    for tile in result.tiles[:count]:
        lines.append("  ".join(filter(None, _tile_words(tile))))
    if result.absent is not None:
        lines.append(f"not in this index: p {result.absent:.2f}")
    return "\n".join(lines)


def _tile_words(tile: RankedTile) -> Iterator[str]:
    yield f"  {tile['rank']:>2}"
    if place := read_coordinates(tile):
        yield "{:.5f} {:.5f}".format(*place)
    yield f"tile {tile['tile']}"
    if tile["probability"] is not None:
        yield f"p {tile['probability']:.2f}"
    else:
        yield f"score {tile['score']:.3f}"


def to_geojson(results: Sequence[SearchResult]) -> str:
    """Return a FeatureCollection (RFC 7946): a point for each tile whose place is known."""
    features = [
        {
            "type": "Feature",
            "geometry": {
                "type": "Point",
                "coordinates": [tile["longitude"], tile["latitude"]],
            },
            "properties": _describe(result, tile),
        }
        for result, tile in _placed(results)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, indent=1) + "\n"


def to_kml(results: Sequence[SearchResult]) -> str:
    """Return a KML document: a folder for each photo, a placemark for each tile with a place."""
    ElementTree.register_namespace("", KML)
    root = ElementTree.Element(f"{{{KML}}}kml")
    document = ElementTree.SubElement(root, f"{{{KML}}}Document")
    for result in results:
        folder = _append(document, "Folder")
        _append(folder, "name", result.query)
        for _, tile in _placed([result]):
            mark = _append(folder, "Placemark")
            _append(mark, "name", f"{tile['rank']}: {tile['tile']}")
            facts = _describe(result, tile)
            _append(mark, "description", ", ".join(f"{k} {v}" for k, v in facts.items()))
            point = _append(mark, "Point")
            _append(point, "coordinates", f"{tile['longitude']},{tile['latitude']}")
    return ElementTree.tostring(root, "unicode", xml_declaration=True) + "\n"


def to_csv(results: Sequence[SearchResult]) -> str:
    """Return a table with a row for each tile; a photo that found none has a row of its own."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for result in results:
        for tile in result.tiles:
            place = {name: tile[name] for name in ("latitude", "longitude")}
            table.writerow(_describe(result, tile) | place)
        if not result.tiles:
            table.writerow({"query": result.query})
    return text.getvalue()


def _placed(results: Sequence[SearchResult]) -> Iterator[tuple[SearchResult, RankedTile]]:
    for result in results:
        for tile in result.tiles:
            if read_coordinates(tile):
                yield result, tile


def _describe(result: SearchResult, tile: RankedTile) -> dict[str, object]:
    """Return what is told of a tile beside its place."""
    return {
        "query": result.query,
        "rank": tile["rank"],
        "tile": tile["tile"],
        "probability": tile["probability"],
        "score": tile["score"],
        "not_in_index": result.absent,
    }


def _append(parent: ElementTree.Element, name: str, text: str = "") -> ElementTree.Element:
    child = ElementTree.SubElement(parent, f"{{{KML}}}{name}")
    child.text = text or None
    return child
