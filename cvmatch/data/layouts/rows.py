"""Rows that a layout yields: the files of a pair, as its table states them, and its position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

SPLITS = ("train", "val")

MISSING = "no such file"

Reject = dict[str, str | None]
"""A row that cannot be used: `pair_id` (None where the line names none), `file`, `reason`."""

Position = tuple[float, float]
"""Latitude and longitude, in degrees."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a split's table: the stated paths, which need not be the files' true names."""

    pair_id: str | None
    """None where the line cannot be used, as `reason` then says."""
    aerial: str
    ground: str
    reason: str = ""
    classes: str = ""
    """Class map of the aerial; empty: none is known."""
    needs_classes: bool = False
    """Whether a class map that is not there is a fault."""
    position: Position | None = None
    heading: float | None = None
    """Where the middle of the panorama looks, in degrees clockwise from north; None: as its file
    says, else north."""


@runtime_checkable
class Layout(Protocol):
    """Where the parts of a data set lie."""

    @property
    def root(self) -> str:
        """Directory that the paths in the tables start from."""
        ...

    @property
    def tables(self) -> dict[str, str]:
        """Table of each split that is there."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """All tables that rows depend on; an empty name stands for one that is not there."""
        ...

    @property
    def photos(self) -> bool:
        """Whether panoramas are photos of any kind, which `cvmatch.data.photos` makes bands of."""
        ...

    def name_table(self, split: str) -> str:
        """Return the name that the table of a split has."""
        ...

    def read_rows(self, split: str) -> list[Row]:
        """Read the rows of a split that is there, each id once.

        Raises:
            ValueError: no rows, no table, or an id twice; names file, ids and lines.
        """
        ...


def check_disjoint(layout: Layout, split: str, rows: list[Row]) -> None:
    """Raise ValueError, naming them and the tables, where an id or a picture is in another split.

    Names of pictures are compared as the tables state them.
    """
    kinds = {
        "id": lambda row: [row.pair_id],
        "picture": lambda row: [row.aerial.lower(), row.ground.lower()],
    }
    for other in sorted(set(layout.tables) - {split}):
        others = [row for row in layout.read_rows(other) if row.pair_id is not None]
        for kind, names_of in kinds.items():
            known = {name for row in rows if row.pair_id is not None for name in names_of(row)}
            shared = sorted({name for row in others for name in names_of(row)} & known)
            if shared:
                raise ValueError(
                    f"{layout.tables[split]} and {layout.tables[other]}: expected no {kind} in "
                    f"both, got {len(shared)}: {name_first(shared)}. Evaluation would see trained "
                    "pairs: remove them from one file. (If only their names are alike, pairs of "
                    "your own are told apart by a column pair_id.)"
                )


def check_once(table: str, numbered: Sequence[tuple[int, Row]]) -> list[Row]:
    """Return the rows of a table, whose lines are given, if there are any and no id is twice.

    Raises:
        ValueError: not so; names file, ids and lines.
    """
    lines: dict[str, int] = {}
    twice = []
    for line, row in numbered:
        if row.pair_id is not None and lines.setdefault(row.pair_id, line) != line:
            twice.append(f"{row.pair_id} (lines {lines[row.pair_id]} and {line})")
    if twice:
        raise ValueError(
            f"{table}: expected each id once, got {len(twice)} again: {name_first(twice)}. "
            "Remove the repeated lines. (If only their names are alike, pairs of your own are told "
            "apart by a column pair_id.)"
        )
    if not numbered:
        raise ValueError(f"{table}: expected lines of a panorama and a tile, got an empty split.")
    return [row for _, row in numbered]


def name_first(items: Sequence[str]) -> str:
    """Name at most five of many."""
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
