"""The rows between stages: their columns, and the palette of the class maps.

Pictures travel as encoded bytes (PNG or JPEG) and are decoded once, by the actor that needs pixels.
Every row is keyed by `pair_id`. A failed row carries its reason in `error` and does not raise, or
Ray would drop its whole block or restart the actor for ever (Ray 2.60, measured).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
QUERY_VECTOR = "query_vector"
TILE_VECTOR = "tile_vector"
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
"""Columns of `PairDataset.rows`."""

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
    """Cast a table to the columns of `wanted`; one that is absent is null, and so is NaN.

    A column without any value has no type in a stream: to the second stage it comes as NaN, which
    a cast would make the text "nan". Tensors of Ray become plain lists, and pictures as Hugging
    Face's datasets store them, struct(bytes, path), their bytes.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError: a column cannot be cast.
    """
    columns = [
        _typed(table[field.name], field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in wanted
    ]
    return pa.table(columns, schema=wanted)


def has_id(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return whether each `pair_id` names a row: null, empty and blank ones do not."""
    trimmed = pc.call_function("ascii_trim_whitespace", [ids.cast(pa.string())])
    return pc.fill_null(pc.call_function("not_equal", [trimmed, ""]), False)


def reject_unusable(table: pa.Table) -> pa.Table:
    """Check rows that others wrote: drop those without an id, give impossible ones an `error`.

    Positions of the latter become null, so that nothing prints what is no number of JSON. Rows
    that had an `error` keep it. Columns are as `conform` makes them.
    """
    table = table.filter(has_id(table[PAIR_ID]))
    if not {LATITUDE, LONGITUDE, ERROR} <= set(table.column_names):
        return table
    places = [table[name].to_numpy() for name in (LATITUDE, LONGITUDE)]
    # A NaN, which `conform` makes of null here, is a place that is not known.
    impossible = [np.abs(place) > most for place, most in zip(places, (90, 180), strict=True)]
    impossible.append(np.isnan(places[0]) != np.isnan(places[1]))
    if not (bad := np.any(impossible, axis=0)).any():
        return table
    errors = table[ERROR].to_pylist()
    for row in np.flatnonzero(bad & np.array([error is None for error in errors])):
        errors[row] = (
            "position: expected latitude (-90 to 90) and longitude (-180 to 180) in degrees, or "
            f"neither, got {places[0][row]} and {places[1][row]}"
        )
    changed = {ERROR: pa.array(errors, pa.string())}
    for name, place in zip((LATITUDE, LONGITUDE), places, strict=True):
        changed[name] = pa.array(np.where(bad, np.nan, place), from_pandas=True)
    return pa.table(
        {name: changed.get(name, table[name]) for name in table.column_names}, schema=table.schema
    )


def read_errors(column: Any) -> list[str | None]:
    """Why each row of a batch failed, from its column `error`; None for a good row.

    Of arrays of numpy, pandas or Arrow. Where no row of a block has failed, the column has no type
    in a stream, and comes to actors as NaN, which is true: `if error` takes it for a failure.

    Raises:
        pyarrow.ArrowTypeError: it holds something else than text.
    """
    values = np.asarray(column, dtype=object)  # its NaN are Python's, which Arrow knows as null
    return pa.array(values, pa.string(), from_pandas=True).to_pylist()


def object_array(values: Sequence[Any]) -> np.ndarray:
    """Return the values as an object array, as columns of a batch are.

    It may hold None; numpy's own arrays of bytes lose zeros at the end.
    """
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def with_nulls(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put None for NaN where text or bytes belong in a batch of numpy's.

    What an actor hands on as it came: another batch of the same block may have values there, and
    Arrow joins them with nulls, but not with numbers.
    """
    kinds = {field.name: field.type for field in SYNTHESIZED if field.type != pa.float64()}
    found = dict(batch)
    for name, values in batch.items():
        if name in kinds and np.issubdtype(values.dtype, np.floating):
            found[name] = np.full(len(values), None, dtype=object)
    return found


def good_rows(table: pa.Table) -> pa.Table:
    """Return the rows of a table that have not failed; the same as `read_errors`, but fast."""
    return table.filter(pc.field(ERROR).is_null(nan_is_null=True))


def failed_rows(table: pa.Table) -> pa.Table:
    """Return the rows of a table that have failed."""
    return table.filter(~pc.field(ERROR).is_null(nan_is_null=True))


_LETTERS = {"G": GROUND, "A": SYNTHETIC, "S": SYNTHETIC_CLASSES}


def query_columns(modality: str) -> list[str]:
    """Return the columns of the pictures that a query of a modality, such as "G+A", consists of."""
    return [_LETTERS[letter] for letter in modality.split("+")]


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
            "Run the stage that adds them first (see the table of rows in docs/cvusa.md)."
        )


def _typed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    if isinstance(column.type, pa.ExtensionType):
        stored = [chunk.storage for chunk in column.chunks]
        column = pa.chunked_array(stored, column.type.storage_type)
    if pa.types.is_struct(column.type) and "bytes" in [field.name for field in column.type.fields]:
        options = pc.StructFieldOptions(["bytes"])
        column = pc.call_function("struct_field", [column], options)
    if pa.types.is_floating(column.type):
        numbers = pa.array(column.to_numpy(), from_pandas=True)  # NaN -> null
        if numbers.null_count == len(numbers):
            return pa.nulls(len(numbers), kind)
        return numbers.cast(kind)
    return column.cast(kind)
