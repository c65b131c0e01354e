"""CSV files as people and spreadsheets write them."""

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from cvmatch.data import storage
from cvmatch.data.images import is_picture

_DELIMITERS = (",", ";", "\t")


def read_csv(table: str, named: Collection[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """Yield line number, from 1, and stripped cells.

    CRLF, a bare end, BOM, UTF-16, semicolons and tabs are fine, as spreadsheets save them.
    `named`: columns, in small letters, that a first line which names columns has.
    """
    data = storage.read_bytes(table)
    try:
        text = data.decode(_find_encoding(data))
        lines = _split_cells(io.StringIO(text, newline=""), _find_delimiter(text, named))
        for cells in lines:
            yield lines.line_num, [cell.strip() for cell in cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{table}: expected a CSV in UTF-8, got {error}. Save it again as CSV UTF-8."
        ) from error


def _find_encoding(data: bytes) -> str:
    """Return UTF-16 where a byte order mark, or every second byte of the start, says so."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    start = data[:64]
    if len(start) >= 2 and not any(start[1::2]):
        return "utf-16-le"
    if len(start) >= 2 and not any(start[0::2]):
        return "utf-16-be"
    return "utf-8-sig"


def _split_cells(lines: Iterable[str], delimiter: str) -> Any:
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t")


def _find_delimiter(text: str, named: Collection[str]) -> str:
    """Return what parts `named`, two paths of pictures or two numbers in one of the first lines."""
    first = [line for line in text.splitlines()[:100] if line.strip()][:3]
    for delimiter in _DELIMITERS:
        for cells in _split_cells(first, delimiter):
            if named and {cell.strip().lower() for cell in cells}.issuperset(named):
                return delimiter
            two = [cell.strip() for cell in cells[:2]]
            if len(two) == 2 and (all(map(is_picture, two)) or all(map(_is_number, two))):
                return delimiter
    return _DELIMITERS[0]


def _is_number(cell: str) -> bool:
    try:
        parse_number(cell)
    except ValueError:
        return False
    return True


def parse_number(cell: str) -> float:
    """Read a number, which may have a decimal comma, as where semicolons part the cells."""
    return float(cell.replace(",", "."))


def index_columns(cells: Sequence[str]) -> dict[str, int]:
    """Return where a first line names each column (in small letters), for the first time."""
    return {name.lower(): place for place, name in reversed([*enumerate(cells)])}
