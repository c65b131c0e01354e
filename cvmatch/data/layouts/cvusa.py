"""A CVUSA directory as users have it.

Two layouts, found by looking (`<id>` is seven digits):

    subset    train-19zl.csv         bingmap/input<id>.png  streetview/<id>.jpg
    official  splits/train-19zl.csv  bingmap/19/<id>.jpg    streetview/panos/<id>.jpg

Either may hold class maps, `segmap/output<id>.png`, and positions, `split_locations/all.csv` or
`all.csv`, whose line i begins with latitude and longitude of id i. Names may differ in case.
"""

import math
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cvmatch.data import storage
from cvmatch.data.images import is_picture
from cvmatch.data.layouts.csv_table import parse_number, read_csv
from cvmatch.data.layouts.rows import SPLITS, Position, Row, check_once

_NAME = re.compile(r"(?:input|output)?([0-9]{1,18})", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CVUSA:
    """A data set in one of CVUSA's layouts (a `Layout`)."""

    root: str
    tables: dict[str, str]
    locations: str | None = None
    """CSV of positions, or None."""
    photos: bool = False

    @property
    def sources(self) -> Sequence[str]:
        """Tables of the splits and of positions."""
        return *self.tables.values(), self.locations or ""

    def name_table(self, split: str) -> str:
        """Return the name of a split's CSV."""
        return f"{split}-19zl.csv"

    def read_rows(self, split: str) -> list[Row]:
        """Read a split's CSV, and the positions and class maps of its ids."""
        positions = read_positions(self.locations) if self.locations else []
        return [_complete(row, positions) for row in read_rows(self.tables[split])]


def find_at(root: str) -> CVUSA | None:
    """Return the data set whose parts lie in `root`; None where none does."""
    names = storage.names(root)
    alike = _alike(names)
    for folder in ("", alike.get("splits")):
        if folder is None:
            continue
        location = storage.inside(root, folder) if folder else root
        files = _alike(storage.names(location)) if folder else alike
        tables = {
            s: storage.join(location, files[f"{s}-19zl.csv"])
            for s in SPLITS
            if f"{s}-19zl.csv" in files
        }
        if tables:
            return CVUSA(root=root, tables=tables, locations=_locations(root, alike))
    return None


def read_rows(table: str) -> list[Row]:
    """Read a split's CSV: aerial, ground, ignored columns; a header is left out.

    Raises:
        ValueError: no rows, not a CSV, or an id twice; names file, ids and lines.
    """
    rows = [
        (line, _row(line, cells))
        for line, cells in read_csv(table)
        if any(cells) and not (line == 1 and not any(map(is_picture, cells)))
    ]
    return check_once(table, rows)


def read_positions(locations: str) -> list[Position | None]:
    """Read (latitude, longitude) in degrees of id i + 1 as item i; None where a line is empty.

    Raises:
        ValueError: a line (but the first, a header) holds no position; names it.
    """
    positions: list[Position | None] = []
    for line, cells in read_csv(locations):
        try:
            position = (parse_number(cells[0]), parse_number(cells[1])) if any(cells) else None
        except (ValueError, IndexError):
            if line == 1:
                continue
            position = (math.nan, math.nan)
        if position and not (abs(position[0]) <= 90 and abs(position[1]) <= 180):
            raise ValueError(
                f"{locations} line {line}: expected latitude (-90 to 90) and longitude (-180 to "
                f"180) first, got {cells[:2]}. Mend the line, or remove the file to go without."
            )
        positions.append(position)
    return positions


def _complete(row: Row, positions: Sequence[Position | None]) -> Row:
    if row.pair_id is None:
        return row
    number = int(row.pair_id)
    position = positions[number - 1] if 0 < number <= len(positions) else None
    return replace(row, classes=f"segmap/output{row.pair_id}.png", position=position)


def _locations(root: str, alike: dict[str, str]) -> str | None:
    folder = alike.get("split_locations")
    name = folder and _alike(storage.names(storage.inside(root, folder))).get("all.csv")
    if name:
        return storage.inside(root, f"{folder}/{name}")
    return storage.join(root, alike["all.csv"]) if "all.csv" in alike else None


def _alike(names: list[str]) -> dict[str, str]:
    """Return names by their lower case; of those that differ in case alone, the last in order."""
    return {name.lower(): name for name in sorted(names)}


def _row(line: int, cells: list[str]) -> Row:
    if len(cells) < 2:
        return Row(None, cells[0], "", f"line {line}: expected an aerial and a ground path")
    aerial, ground = cells[:2]
    pair_id, other = _id_of(aerial), _id_of(ground)
    if pair_id is None or other is None:
        stated = aerial if pair_id is None else ground
        return Row(None, stated, "", f"line {line}: not named by an id, as input0000001.png is")
    if pair_id != other:
        return Row(None, aerial, ground, f"line {line}: its ground is another id's, {ground}")
    return Row(pair_id, aerial, ground)


def _id_of(stated: str) -> str | None:
    """Return the id in a file's name, as seven digits; None for others, such as macOS's `._*`."""
    stem = posixpath.splitext(posixpath.basename(stated.replace("\\", "/")))[0]
    match = _NAME.fullmatch(stem)
    return f"{int(match[1]):07d}" if match else None
