"""Pairs of a person's own: two tables that name files, and whatever folders these lie in.

    train.csv, val.csv    panorama, tile and, where known, pair_id, latitude, longitude, heading and
                          classes; the first line names the columns, in any order and case

Paths start from the directory of the tables. Panoramas are photos of any kind (`data.photos`).
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from cvmatch.data import storage
from cvmatch.data.layouts.csv_table import index_columns, parse_number, read_csv
from cvmatch.data.layouts.rows import SPLITS, Position, Row, check_once

_log = logging.getLogger(__name__)

NEEDED = ("panorama", "tile")
"""Columns of each table."""

COLUMNS = (*NEEDED, "pair_id", "latitude", "longitude", "heading", "classes")
"""Columns that are read."""


@dataclass(frozen=True, kw_only=True)
class OwnPairs:
    """A directory of such tables (a `Layout`)."""

    root: str
    tables: dict[str, str]
    photos: bool = True

    @property
    def sources(self) -> Sequence[str]:
        """The tables."""
        return tuple(self.tables.values())

    def name_table(self, split: str) -> str:
        """Return the name of a split's table."""
        return f"{split}.csv"

    def read_rows(self, split: str) -> list[Row]:
        """Read a split's table."""
        return read_rows(self.tables[split])


def find_at(root: str) -> OwnPairs | None:
    """Return the pairs whose tables lie in `root`; None where no table has the columns."""
    names = {name.lower(): name for name in sorted(storage.names(root))}
    tables = {
        split: storage.join(root, names[f"{split}.csv"])
        for split in SPLITS
        if f"{split}.csv" in names
    }
    known = any(map(_is_table, tables.values()))
    return OwnPairs(root=root, tables=tables) if known else None


def _is_table(table: str) -> bool:
    """Return whether a file that may be anybody's names the columns."""
    try:
        return set(NEEDED) <= set(_find_columns(table))
    except ValueError:  # no text in UTF-8 or UTF-16
        return False


def read_rows(table: str) -> list[Row]:
    """Read a table of pairs.

    Raises:
        ValueError: a column lacks, no rows, not a CSV, or an id twice; names file, ids and lines.
    """
    places = _find_columns(table)
    if missing := [name for name in NEEDED if name not in places]:
        raise ValueError(
            f"{table}: expected a first line that names the columns {list(NEEDED)}, got "
            f"{list(places)}; {missing} lack. Name them; {list(COLUMNS[2:])} may stand there too."
        )
    rows = [
        (line, _read_row(line, cells, places))
        for line, cells in read_csv(table, NEEDED)
        if any(cells)
    ]
    _warn_of_tiles(table, [row for _, row in rows[1:]])
    return check_once(table, rows[1:])


def _warn_of_tiles(table: str, rows: Sequence[Row]) -> None:
    """Say where a tile stands in several pairs: it would be in an index as often, with ties."""
    counts = Counter(row.aerial for row in rows if row.pair_id is not None)
    if several := [tile for tile, count in counts.items() if count > 1]:
        _log.warning(
            "%s: %d tiles stand in several lines, such as %s. Each line is a tile of its own in an "
            "index, and equal tiles count against a query: keep one panorama of each for a split "
            "that is evaluated.",
            table, len(several), several[0],
        )  # fmt: skip


def _find_columns(table: str) -> dict[str, int]:
    """Return where each column stands, by the first line."""
    first = next((cells for _, cells in read_csv(table, NEEDED) if any(cells)), [])
    return index_columns(first)


def _read_row(line: int, cells: Sequence[str], places: Mapping[str, int]) -> Row:
    values = {name: cells[place] for name, place in places.items() if place < len(cells)}
    tile, panorama = values.get("tile", ""), values.get("panorama", "")
    if not (tile and panorama):
        return Row(None, tile, panorama, f"line {line}: expected a panorama and a tile")
    try:
        position, heading = parse_place(values)
    except ValueError as error:
        return Row(None, tile, panorama, f"line {line}: {error}")
    return Row(
        pair_id=values.get("pair_id") or PurePosixPath(tile.replace("\\", "/")).stem,
        aerial=tile,
        ground=panorama,
        classes=values.get("classes", ""),
        needs_classes=True,
        position=position,
        heading=heading,
    )


def parse_place(values: Mapping[str, str]) -> tuple[Position | None, float | None]:
    """Return the position and heading that cells state; None where they are empty.

    Args:
        values: cells by column: `latitude`, `longitude` and `heading`, in degrees.

    Raises:
        ValueError: they are no numbers, or impossible ones.
    """
    return _read_position(values), _read_heading(values)


def _read_position(values: Mapping[str, str]) -> Position | None:
    stated = [values.get(name, "") for name in ("latitude", "longitude")]
    if not any(stated):
        return None
    try:
        latitude, longitude = map(parse_number, stated)
    except ValueError:
        raise ValueError(f"expected latitude and longitude in degrees, got {stated}") from None
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise ValueError(f"expected latitude (-90 to 90) and longitude (-180 to 180), got {stated}")
    return latitude, longitude


def _read_heading(values: Mapping[str, str]) -> float | None:
    stated = values.get("heading", "")
    try:
        heading = parse_number(stated) if stated else None
    except ValueError:
        raise ValueError(f"expected a heading in degrees, got {stated!r}") from None
    if heading is not None and not -360 <= heading <= 360:
        raise ValueError(f"expected a heading in degrees (-360 to 360), got {stated!r}")
    return heading
