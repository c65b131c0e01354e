"""The page of a search: each panorama, what was made of it, and the tiles that it found."""

from collections.abc import Mapping, Sequence
from typing import Any

from cvmatch.data import geography, images, schema
from cvmatch.report import places
from cvmatch.report.page import Page, provenance, report
from cvmatch.report.sheet import Example, Tile
from cvmatch.search.files import Answer


def found(answers: Sequence[Answer], output: str, tiles: str = "") -> str:
    """Write the page to the file `output`; gives its location.

    `tiles`: URI of rows with pictures of the tiles.
    """
    wanted = {tile["tile"] for answer in answers for tile in answer.tiles}
    pictures = places.pictures(tiles, wanted) if tiles else {}
    modalities = sorted({tile["modality"] for answer in answers for tile in answer.tiles})
    page = Page(
        title="cvmatch: search",
        summary=f"Panoramas: {len(answers)}, searched by {', '.join(modalities)}. "
        "Which tile is the "
        "right one is not known here: the first one is the best guess.",
        run=provenance(),
        places="Panoramas",
        examples=[_example(answer, pictures) for answer in answers],
    )
    return report(page, output)


def _example(answer: Answer, pictures: places.Pictures) -> Example:
    synthetic = answer.pictures.get(schema.SYNTHETIC)
    classes = answer.pictures.get(schema.SYNTHETIC_CLASSES)
    return Example(
        pair_id=answer.query,
        ground=images.decode(answer.pictures[schema.GROUND] or b""),
        synthetic=images.decode(synthetic) if synthetic else None,
        classes=images.decode_ids(classes) if classes else None,
        top=[
            Tile(
                pair_id=tile["tile"],
                picture=places.tile(pictures.get(tile["tile"])),
                score=tile["score"],
                place=_place(tile),
            )
            for tile in answer.tiles
        ],
        positions=_positions(answer),
    )


def _positions(answer: Answer) -> list[tuple[float, float]]:
    """Metres east and north of the tiles with coordinates from the first one."""
    found = [place for tile in answer.tiles if (place := _place(tile))]
    return [geography.offset_m(found[0], place) for place in found]


def _place(tile: Mapping[str, Any]) -> tuple[float, float] | None:
    latitude, longitude = tile["latitude"], tile["longitude"]
    return None if latitude is None or longitude is None else (latitude, longitude)
