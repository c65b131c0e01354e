"""Rows of pairs and the tiles that were found for them -> the examples of a page."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from cvmatch.data import images, schema, tables
from cvmatch.report.sheet import Example, Pixels, Tile

_COLUMNS = (schema.GROUND, schema.AERIAL, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES)

Pictures = Mapping[str, Mapping[str, Any]]
"""Encoded pictures by pair_id and column."""


def pictures(location: str, wanted: Collection[str]) -> Pictures:
    """Those of the `wanted` pairs that are among the synthesized rows at `location`."""
    found = {}
    for table in tables.batches(location, [schema.PAIR_ID, *_COLUMNS]):
        kept = table.filter(pc.field(schema.PAIR_ID).isin(list(wanted)))
        found |= {row[schema.PAIR_ID]: row for row in kept.to_pylist()}
    return found


def example(
    pair_id: str,
    tiles: Sequence[tuple[str, float]],
    found: Pictures,
    rank: int | None = None,
    note: str = "",
) -> Example:
    """The example of a query and its best `tiles` (id, score), of the pictures that were found."""
    own = found[pair_id]
    synthetic, classes = own[schema.SYNTHETIC], own[schema.SYNTHETIC_CLASSES]
    return Example(
        pair_id=pair_id,
        ground=images.decode(own[schema.GROUND]),
        synthetic=images.decode(synthetic) if synthetic else None,
        classes=images.decode_ids(classes) if classes else None,
        aerial=images.decode(own[schema.AERIAL]),
        top=[Tile(pair_id=n, picture=tile(found.get(n)), score=score) for n, score in tiles],
        rank=rank,
        note=note,
    )


def tile(row: Mapping[str, Any] | None) -> Pixels | None:
    """The picture of a tile, if it is at hand."""
    return images.decode(row[schema.AERIAL]) if row else None
