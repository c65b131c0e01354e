"""The page of a search: each panorama, what was made of it, and the best tiles."""

from collections.abc import Sequence

from cvmatch.data import geography, images, schema
from cvmatch.report import examples
from cvmatch.report.examples import Example, Tile
from cvmatch.report.page import Page, describe_run, write_page
from cvmatch.search.files import SearchResult, read_coordinates


def write_search_page(results: Sequence[SearchResult], output: str, tiles: str = "") -> str:
    """Write the page of a search; returns its location.

    Args:
        results: one for each panorama.
        output: location of the file.
        tiles: URI of rows with pictures of the tiles; empty: the page shows none.
    """
    names = {tile["tile"] for result in results for tile in result.tiles}
    pictures = examples.read_pictures(tiles, names) if tiles else {}
    modalities = sorted({tile["modality"] for result in results for tile in result.tiles})
    searched = [result for result in results if result.error is None]
    page = Page(
        title="cvmatch: search",
        summary=f"Panoramas: {len(searched)}, searched by {', '.join(modalities)}. Which tile is "
        "the right one is not known here: the first one is the best guess.",
        run=describe_run(),
        examples_title="Panoramas",
        examples=[_build_example(result, pictures) for result in searched],
        limits=[f"{one.query} could not be searched: {one.error}" for one in results if one.error],
    )
    return write_page(page, output)


def _build_example(result: SearchResult, pictures: examples.Pictures) -> Example:
    synthetic = result.pictures.get(schema.SYNTHETIC)
    classes = result.pictures.get(schema.SYNTHETIC_CLASSES)
    return Example(
        pair_id=result.query,
        ground=images.decode(result.pictures[schema.GROUND] or b""),
        synthetic=images.decode(synthetic) if synthetic else None,
        classes=images.decode_ids(classes) if classes else None,
        top=[
            Tile(
                pair_id=tile["tile"],
                picture=examples.decode_tile(pictures.get(tile["tile"])),
                score=tile["score"],
                branches=tile["branches"],
                coordinates=read_coordinates(tile),
            )
            for tile in result.tiles
        ],
        note="" if result.read is None else f"Read: {result.read}.",
        offsets=_measure_offsets(result),
    )


def _measure_offsets(result: SearchResult) -> list[tuple[float, float]]:
    """Return metres east and north of the tiles with coordinates from the first one."""
    known = [degrees for tile in result.tiles if (degrees := read_coordinates(tile))]
    return [geography.offset_m(known[0], degrees) for degrees in known]
