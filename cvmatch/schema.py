"""The rows between stages: their columns, and the palette of the class maps.

Pictures travel as encoded bytes (PNG or JPEG) and are decoded once, by the actor that needs pixels.
Every row is keyed by `pair_id`. A failed row carries its reason in `error` and does not raise, or
Ray would drop its whole block or restart the actor for ever (Ray 2.60, measured).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

VERSION = 1
"""Version of the rows on disk; a stage refuses rows of another version."""

PAIR_ID = "pair_id"
GROUND = "ground"
AERIAL = "aerial"
CLASSES = "classes"
LATITUDE = "latitude"
LONGITUDE = "longitude"
SYNTHETIC = "synthetic"
SYNTHETIC_CLASSES = "synthetic_classes"
ERROR = "error"

PAIRS = pa.schema(
    [
        pa.field(PAIR_ID, pa.string(), nullable=False),  # CVUSA's seven digits
        pa.field(GROUND, pa.binary()),  # 360-degree panorama G, north in the middle column
        pa.field(AERIAL, pa.binary()),  # satellite tile C, north up
        pa.field(CLASSES, pa.binary()),  # class map of C in PALETTE's colours; null where none
        pa.field(LATITUDE, pa.float64()),  # degrees north of the tile; null where unknown
        pa.field(LONGITUDE, pa.float64()),  # degrees east of the tile; null where unknown
        pa.field(ERROR, pa.string()),  # why the row failed; null for a good row
    ]
)
"""What `ingest` gives."""

SYNTHESIZED = PAIRS.insert(4, pa.field(SYNTHETIC, pa.binary())).insert(
    5, pa.field(SYNTHETIC_CLASSES, pa.binary())
)
"""What `generate` and `segment` add: A as a PNG, and S as a PNG of class ids (mode L)."""

LABELS = ("impervious", "clutter", "tree", "building", "low vegetation", "car")
"""Names of the classes by id, as in ISPRS Potsdam and Vaihingen."""

PALETTE = (
    (255, 255, 255),
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (0, 255, 255),
    (255, 255, 0),
)
"""Colours (RGB) of the classes by id. CVUSA's published subset leaves yellow, the cars, out."""

IGNORE = 255
"""Class id of pixels that no loss or metric counts."""


def conform(table: pa.Table, wanted: pa.Schema = SYNTHESIZED) -> pa.Table:
    """The columns of `wanted` in its order and types; one that is absent is null.

    A column without any value has no type in a stream; behind an actor it is one of NaN.

    Raises:
        pyarrow.ArrowInvalid: a column cannot be cast.
    """
    columns = [
        _cast(table[field.name], field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in wanted
    ]
    return pa.table(columns, schema=wanted)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    untyped = pa.types.is_floating(column.type) and not pa.types.is_floating(kind)
    if untyped and np.isnan(column.to_numpy()).all():
        return pa.chunked_array([pa.nulls(len(column), kind)])
    return column.cast(kind)


def read_errors(column: Iterable[object]) -> list[str | None]:
    """Returns why each row of a batch failed; None for a good row.

    The one way to read the column `error` of a batch: where no row failed it has no type in a
    stream, and arrives as NaN, which is as true as a reason.
    """
    return [reason if isinstance(reason, str) else None for reason in column]


def good_rows(batch: Mapping[str, Sequence[object] | np.ndarray]) -> list[int]:
    """Returns the positions of a batch's rows that have not failed."""
    return [row for row, reason in enumerate(read_errors(batch[ERROR])) if reason is None]


def require(present: Iterable[str], needed: Iterable[str], where: str) -> None:
    """Check that rows carry what a stage reads.

    Raises:
        ValueError: a needed column is absent; names `where`, what is there and what is missing.
    """
    have = set(present)
    missing = sorted(set(needed) - have)
    if missing:
        raise ValueError(
            f"{where}: expected columns {missing}, got only {sorted(have)}. "
            "Run the stage that adds them first (see the table of stages in README.md)."
        )
