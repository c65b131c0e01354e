"""A CVUSA directory as users have it -> its rows, files and positions, from CSVs and listings.

Two layouts, found by looking (`<id>` is seven digits):

    subset    train-19zl.csv         bingmap/input<id>.png  streetview/<id>.jpg
    official  splits/train-19zl.csv  bingmap/19/<id>.jpg    streetview/panos/<id>.jpg

Either may hold class maps, `segmap/output<id>.png`, and positions, `split_locations/all.csv` or
`all.csv`, whose line i begins with latitude and longitude of id i. Names may differ in case.
"""

import csv
import io
import math
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cvmatch.data import storage

SPLITS = ("train", "val")

_SUFFIXES = (".jpg", ".png", ".jpeg", ".jpe", ".jfif")  # in any case
_PREFIX = re.compile("^(input|output)", re.IGNORECASE)
_NAME = re.compile(r"(?:input|output)?([0-9]{1,18})", re.IGNORECASE)
_DELIMITERS = (",", ";", "\t")
_SEARCHED = 2  # levels below the given root: an archive unpacks to CVUSA_subset/CVUSA_subset
_PICTURES = ("bingmap", "polarmap", "segmap", "sky_mask", "streetview")  # big; not searched

MISSING = "no such file"

_TILES_ALONE = (
    " Pictures of tiles alone come into an index as Parquet rows of pair_id and aerial (the bytes "
    "of a PNG or JPEG): cvmatch build-index --rows DIRECTORY."
)

Reject = dict[str, str | None]
"""A row that cannot be used: `pair_id` (None where the line names none), `file`, `reason`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a data set lie."""

    root: str
    """Directory that the paths in the CSVs start from."""
    tables: dict[str, str]
    """CSV of each split that is there."""
    locations: str | None
    """CSV of positions, or None."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a split's CSV: the stated paths, which need not be the files' true names."""

    pair_id: str | None
    """Seven digits; None where the line cannot be used, as `reason` then says."""
    aerial: str
    ground: str
    reason: str = ""


def find(root: str) -> Layout:
    """Find the data set at `root`, or in the only directory at most two levels below.

    Raises:
        ValueError: there is none, or more than one.
    """
    level = [storage.absolute(root).rstrip("/")]
    for depth in range(_SEARCHED + 1):
        layouts = [layout for folder in level if (layout := _layout_at(folder))]
        if len(layouts) > 1:
            raise ValueError(
                f"{root}: expected one CVUSA data set, got {[one.root for one in layouts]}. "
                "Pass the one you mean as the root (this job's flag that ends in .root)."
            )
        if layouts:
            return layouts[0]
        if depth < _SEARCHED:
            level = [below for folder in level for below in _directories(folder)]
    names = storage.names(root)
    alone = any(map(_is_picture, names))
    raise ValueError(
        f"{root}: expected train-19zl.csv or val-19zl.csv (CVUSA subset), or the same in splits/ "
        f"(CVUSA), there or at most {_SEARCHED} levels below; got {names[:12]}. "
        "Pass the directory that holds bingmap/ and streetview/ as the root (this job's flag that "
        f"ends in .root).{_TILES_ALONE if alone else ''}"
    )


def read_rows(table: str) -> list[Row]:
    """Read a split's CSV: aerial, ground, ignored columns; a header is left out.

    Raises:
        ValueError: no rows, not a CSV, or an id twice; names file, ids and lines.
    """
    rows, lines, twice = [], {}, []
    for line, cells in _read_csv(table):
        if not any(cells) or (line == 1 and not any(map(_is_picture, cells))):
            continue
        row = _row(line, cells)
        rows.append(row)
        if row.pair_id is not None and lines.setdefault(row.pair_id, line) != line:
            twice.append(f"{row.pair_id} (lines {lines[row.pair_id]} and {line})")
    if twice:
        raise ValueError(
            f"{table}: expected each id once, got {len(twice)} again: {_first(twice)}. "
            "Remove the repeated lines."
        )
    if not rows:
        raise ValueError(f"{table}: expected rows of aerial and ground paths, got an empty split.")
    return rows


def check_disjoint(layout: Layout, split: str, rows: list[Row]) -> None:
    """Raise ValueError, naming ids and files, where an id stands in another split too."""
    ids = {row.pair_id for row in rows if row.pair_id}
    for other in sorted(set(layout.tables) - {split}):
        shared = sorted(
            row.pair_id for row in read_rows(layout.tables[other]) if row.pair_id in ids
        )
        if shared:
            raise ValueError(
                f"{layout.tables[split]} and {layout.tables[other]}: expected no id in both, got "
                f"{len(shared)}: {_first(shared)}. Evaluation would see trained pairs; remove them "
                "from one file."
            )


def read_positions(locations: str) -> list[tuple[float, float] | None]:
    """Read (latitude, longitude) in degrees of id i + 1 as item i; None where a line is empty.

    Raises:
        ValueError: a line (but the first, a header) holds no position; names it.
    """
    positions: list[tuple[float, float] | None] = []
    for line, cells in _read_csv(locations):
        try:
            position = (_number(cells[0]), _number(cells[1])) if any(cells) else None
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


class Listing:
    """Finds files below a root by stated path, leniently; lists each directory once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._folders: dict[str, str | None] = {"": ""}
        self._names: dict[str, dict[str, list[str]]] = {}  # of a folder: lower case -> names

    def find(self, stated: str) -> str | None:
        """Return the file that `stated` means, relative to the root; None where there is none.

        Names may differ in case (`Streetview/`, `.JPG`), in extension and in the prefix `input`. A
        path may be absolute, where it is one below the root.

        Raises:
            ValueError: `stated` leaves the root.
        """
        stated = self._relative(stated)
        storage.inside(self._root, stated)
        parts = [part for part in stated.replace("\\", "/").split("/") if part not in ("", ".")]
        folder = self._folder("/".join(parts[:-1]))
        if folder is None:
            return None
        stem, suffix = posixpath.splitext(parts[-1])
        bare = _PREFIX.sub("", stem)
        for name in dict.fromkeys((stem, bare, f"input{bare}")):
            for ending in (suffix, *_SUFFIXES):
                if match := self._match(folder, f"{name}{ending}"):
                    return posixpath.join(folder, match)
        return None

    def _relative(self, stated: str) -> str:
        path = stated.replace("\\", "/")
        remote = storage.is_remote(self._root)
        root = self._root if remote else storage.resolve(self._root)[1]
        below = path.removeprefix(f"{root.rstrip('/')}/")
        return stated if below == path else below

    def _folder(self, stated: str) -> str | None:
        if stated not in self._folders:
            above, name = posixpath.split(stated)
            parent, match = self._folder(above), None
            if parent is not None:
                match = self._match(parent, name)
            self._folders[stated] = None if match is None else posixpath.join(parent or "", match)
        return self._folders[stated]

    def _match(self, folder: str, name: str) -> str | None:
        """Return the name in a folder that is `name`, or else one that differs in case alone."""
        if folder not in self._names:
            location = storage.inside(self._root, folder) if folder else self._root
            known = self._names.setdefault(folder, {})
            for other in storage.names(location):
                known.setdefault(other.lower(), []).append(other)
        alike = self._names[folder].get(name.lower(), [None])
        return name if name in alike else alike[0]


def find_files(listing: Listing, row: Row) -> list[str | None] | Reject:
    """Return aerial, ground and (or None) class map of a row, or what is wrong with it."""
    if row.pair_id is None:
        return {"pair_id": None, "file": row.aerial, "reason": row.reason}
    files = []
    for stated in (row.aerial, row.ground):
        try:
            files.append(listing.find(stated))
        except ValueError as error:
            return {"pair_id": row.pair_id, "file": stated, "reason": str(error)}
        if files[-1] is None:
            return {"pair_id": row.pair_id, "file": stated, "reason": MISSING}
    return [*files, listing.find(f"segmap/output{row.pair_id}.png")]


def _layout_at(root: str) -> Layout | None:
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
            return Layout(root=root, tables=tables, locations=_locations(root, alike))
    return None


def _locations(root: str, alike: dict[str, str]) -> str | None:
    folder = alike.get("split_locations")
    name = folder and _alike(storage.names(storage.inside(root, folder))).get("all.csv")
    if name:
        return storage.inside(root, f"{folder}/{name}")
    return storage.join(root, alike["all.csv"]) if "all.csv" in alike else None


def _alike(names: list[str]) -> dict[str, str]:
    """Return names by their lower case; of those that differ in case alone, the last in order."""
    return {name.lower(): name for name in sorted(names)}


def _directories(location: str) -> list[str]:
    """List directories that may hold a data set: not hidden ones, macOS's, or those of pictures."""
    return [
        storage.inside(location, name)
        for name in storage.names(location, directories=True)
        if not name.startswith((".", "__MACOSX")) and name.lower() not in _PICTURES
    ]


def _read_csv(table: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number, from 1, and stripped cells.

    CRLF, a bare end, BOM, UTF-16 with one, semicolons and tabs are fine, as spreadsheets save them.
    """
    data = storage.read_bytes(table)
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        lines = _split_cells(io.StringIO(text, newline=""), _find_delimiter(text))
        for cells in lines:
            yield lines.line_num, [cell.strip() for cell in cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{table}: expected a CSV in UTF-8, got {error}. Save it again as CSV UTF-8."
        ) from error


def _split_cells(lines: Iterable[str], delimiter: str) -> Any:
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t")


def _find_delimiter(text: str) -> str:
    """Return what parts two paths of pictures, or two numbers, in one of the first lines."""
    first = [line for line in text.splitlines()[:100] if line.strip()][:3]
    for delimiter in _DELIMITERS:
        for cells in _split_cells(first, delimiter):
            two = [cell.strip() for cell in cells[:2]]
            if len(two) == 2 and (all(map(_is_picture, two)) or all(map(_is_number, two))):
                return delimiter
    return _DELIMITERS[0]


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _number(cell: str) -> float:
    """Read a number, which may have a decimal comma, as where semicolons part the cells."""
    return float(cell.replace(",", "."))


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


def _is_picture(cell: str) -> bool:
    return cell.lower().endswith(_SUFFIXES)


def _first(items: list[str]) -> str:
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
