"""Settings of the index: build it, change it, check it."""

from dataclasses import dataclass, field
from typing import Literal

from cvmatch.data.settings import Ingest
from cvmatch.runtime.settings import Pool

Mode = Literal["auto", "exact", "two-stage"]
"""How tiles are ranked: exact scores all of them, two-stage those of a shortlist."""


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """Tiles, and the actors that embed them."""

    # Large blocks and two calls at a time: docs/decisions.md#blocks-of-tiles
    tiles: Ingest = field(default_factory=lambda: Ingest(split="val", block=128))
    """Data set whose tiles are taken."""
    splits: tuple[Literal["train", "val"], ...] = ()
    """Splits of it that are taken; empty: only `tiles.split`."""
    rows: str = ""
    """URI of a directory of rows (as `cvmatch synthesize` writes) to take instead of `tiles`: any
    Parquet files with pair_id and aerial, and where known latitude and longitude."""
    pool: Pool = field(default_factory=lambda: Pool(batch=32, calls=2))
    """Actors that embed tiles."""
    max_rejected: float = 0.05
    """Largest share of rows without an embedding, in [0, 1]."""
    retry_rejected: bool = False
    """Make the rows again that failed in an earlier run that was not published."""
    dry_run: bool = False
    """Say what would be done, where, and what is done already; then stop."""
    output: str = "data/index"
    """Directory of the index, local or in an object store; a new version joins those there. On
    several nodes: a path that all of them mount."""
    queries: str = ""
    """URI of synthesized rows that measure the shortlist; their tiles need not be known. Empty: not
    measured."""
    seed: int = 0
    """Seed of the choice of queries and of training vectors."""


@dataclass(frozen=True, kw_only=True)
class BuildIndex(GalleryConfig):
    """Embed tiles and publish them as the next version of an index."""

    model: str = "models/matcher"
    """Directory or URI of the matcher."""
    recall: float = 0.99
    """Share of the exact best tiles, in (0, 1], that a two-stage search should find: it re-ranks
    the fewest tiles with which the build's `queries` do. Without these: by the number of tiles."""
    key: str = "auto"
    """FAISS factory key of the shortlist; "auto" chooses by the number of tiles."""
    nprobe: int = 64
    """Lists that a query visits, where the key has lists (IVF: beyond 10 million tiles)."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ValueError(f"build-index: recall is a share in (0, 1], got {self.recall}.")


@dataclass(frozen=True, kw_only=True)
class AddTiles(GalleryConfig):
    """Embed more tiles with an index's own model, and add them: nothing else is done again."""


@dataclass(frozen=True, kw_only=True)
class DeleteTiles:
    """Hide tiles from every search; their numbers stay until the index is compacted."""

    output: str = "data/index"
    """Directory of the index."""
    ids: tuple[str, ...] = ()
    """pair_id of each."""
    file: str = ""
    """URI of a text file with one pair_id a line."""


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Leave deleted tiles out and merge what was added.

    Ranks are those of a build of all that is left; the shortlist keeps the head and the code that
    the first build chose, so that an index which grew much is better built again.
    """

    output: str = "data/index"
    """Directory of the index."""


@dataclass(frozen=True, kw_only=True)
class Vacuum:
    """Remove old versions, and the files that no other one needs once they are a day old: until
    then a job that is running may have put them there."""

    output: str = "data/index"
    """Directory of the index."""
    keep: int = 2
    """Versions that stay, the current one among them. A search that has an older one open goes on;
    one that opens it later finds it gone."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"vacuum: expected keep >= 1, got {self.keep}.")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check an index."""

    index: str = "data/index"
    """Directory of the index, local or in an object store."""
    version: str = ""
    """Version; empty: the current one."""
    deep: bool = False
    """Also hash large files, make all codes again, and embed the check samples again."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show what an index consists of, and what was measured when it was built."""

    index: str = "data/index"
    """Directory of the index, local or in an object store."""
    version: str = ""
    """Version; empty: the current one."""
