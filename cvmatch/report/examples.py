"""Rows of pairs and the tiles that were found for them -> the examples of a page."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from jaxtyping import UInt8

from cvmatch.data import images, schema, tables

Pixels = UInt8[np.ndarray, "_ _ 3"]

_COLUMNS = (schema.GROUND, schema.AERIAL, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES)

Pictures = Mapping[str, Mapping[str, Any]]
"""Encoded pictures by pair_id and column."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A tile that a search answered with."""

    pair_id: str
    """Whose tile it is."""
    picture: Pixels | None
    """The tile, RGB; None where it is not at hand."""
    score: float | int
    """Higher is better."""
    branches: Mapping[str, float] = field(default_factory=dict)
    """What each branch of the matcher adds to the score, where that is known."""
    coordinates: tuple[float, float] | None = None
    """Degrees north and east; None where that is not known."""


class Answer(NamedTuple):
    """A tile of a search by its name."""

    pair_id: str
    score: float
    branches: Mapping[str, float] = {}


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the pipeline made of one panorama."""

    pair_id: str
    ground: Pixels
    """G, the panorama."""
    synthetic: Pixels | None = None
    """A, the generated tile; None where the generator did not run."""
    classes: UInt8[np.ndarray, "_ _"] | None = None
    """S, the map of class ids of A; None where the segmenter did not run."""
    aerial: Pixels | None = None
    """C, the tile that is right; None where that is not known."""
    top: Sequence[Tile]
    """The best tiles, best first."""
    rank: int | None = None
    """Rank of the right tile in the whole gallery, from 1; None where it is not known."""
    note: str = ""
    """Why it is shown."""
    offsets: Sequence[tuple[float, float]] = ()
    """Metres east and north of the best tiles from the first one, for a map; empty: no map."""

    @property
    def class_colors(self) -> Pixels | None:
        """S in the colours of the palette."""
        return None if self.classes is None else images.colours_of(self.classes)


def read_pictures(
    location: str, pair_ids: Collection[str], columns: Sequence[str] = _COLUMNS
) -> Pictures:
    """Read the pictures of those pairs that are among the rows at `location`."""
    pictures = {}
    for table in tables.batches(location, [schema.PAIR_ID, *columns]):
        rows = table.filter(pc.field(schema.PAIR_ID).isin(list(pair_ids)))
        pictures |= {row[schema.PAIR_ID]: row for row in rows.to_pylist()}
    return pictures


def build_example(
    pair_id: str,
    tiles: Sequence[Answer],
    pictures: Pictures,
    rank: int | None = None,
    note: str = "",
) -> Example:
    """Decode the pictures of a query and of its best tiles.

    Args:
        pair_id: the query, which `pictures` holds.
        tiles: the best ones, best first.
        pictures: see `read_pictures`; tiles that it lacks have no picture.
        rank: of the right tile in the whole gallery, from 1.
        note: why the query is shown.
    """
    row = pictures[pair_id]
    synthetic, classes = row[schema.SYNTHETIC], row[schema.SYNTHETIC_CLASSES]
    return Example(
        pair_id=pair_id,
        ground=images.decode(row[schema.GROUND]),
        synthetic=images.decode(synthetic) if synthetic else None,
        classes=images.decode_ids(classes) if classes else None,
        aerial=images.decode(row[schema.AERIAL]),
        top=[
            Tile(
                pair_id=tile.pair_id,
                picture=decode_tile(pictures.get(tile.pair_id)),
                score=tile.score,
                branches=tile.branches,
            )
            for tile in tiles
        ],
        rank=rank,
        note=note,
    )


def decode_tile(row: Mapping[str, Any] | None) -> Pixels | None:
    """Return the picture of a tile, if its row is at hand."""
    return images.decode(row[schema.AERIAL]) if row else None
