"""The manifest of an index version: what it consists of, how it was made, what was measured."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cvmatch.generate.settings import Sampling
from cvmatch.nn.calibration import Calibration

FORMAT = 4
"""Version of the layout; a directory of another one is refused."""

NAME = "manifest.json"

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling) if field.name != "seed")
"""Settings of the generator that queries of one index should share."""


@dataclass(frozen=True)
class FileInfo:
    """Size and hash of a file."""

    bytes: int
    sha256: str
    """Hex."""


Files = dict[str, FileInfo]
"""By path below the root of the index."""


@dataclass(frozen=True)
class ShardInfo:
    """A shard: consecutive tiles of the index."""

    sha: str
    """Its name below `shards/`."""
    rows: int
    row_start: int
    """Row of its first tile."""
    codes: str = ""
    """File of its FAISS codes; empty: not made yet."""


@dataclass(frozen=True)
class AnnPartInfo:
    """A FAISS index of consecutive tiles; a search looks into each of them."""

    file: str
    rows: int
    row_start: int
    """Row of its first tile."""


@dataclass(frozen=True)
class AnnInfo:
    """The FAISS indices of the shortlist."""

    key: str
    """FAISS factory key."""
    nprobe: int
    """Lists that a query visits, where the key has lists."""
    parts: tuple[AnnPartInfo, ...] = ()


@dataclass(frozen=True)
class Recall:
    """Shares, in [0, 1], of the exact answers that the shortlist holds."""

    top1: float
    """Of the best tile."""
    top10: float
    """Of the best ten tiles."""
    shortlist: int
    """Tiles of the shortlist."""
    queries: int
    """Queries that measured it."""


@dataclass(frozen=True)
class IdenticalTiles:
    """Tiles of one and the same vector, which no search tells apart: those of "no imagery"."""

    tiles: int
    pair_ids: tuple[str, ...]
    """Of the first of them."""


@dataclass(frozen=True)
class QueryOrigin:
    """What made the queries of an index; what is not known is empty."""

    generator: str = ""
    """Fingerprint of the generator."""
    segmenter: str = ""
    """Fingerprint of the segmenter."""
    sampling: Mapping[str, float | int | bool] = field(default_factory=dict)
    """The generator's settings, by their names in `Sampling`."""


@dataclass(frozen=True)
class TileOrigin:
    """All that the shards depend on."""

    tower: str
    """Fingerprint of the part of the matcher that embeds tiles."""
    preprocess: str
    shard_rows: int
    batch: int
    """Tiles a call of the tower: the last bits depend on it."""
    tiles: str
    """Fingerprint of the tiles' files."""


@dataclass(frozen=True)
class BytesPerTile:
    """What a search reads or maps."""

    all: float
    ann: float
    """Of the FAISS indices alone."""


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """What a version consists of, how it was made, and what was measured."""

    format: int = FORMAT
    version: str = ""
    """Such as "v000001"; given when it is published, like `created` and `sha256`."""
    parent: str | None = None
    """Version that it followed; of a version not yet published: the one that it changes, if any."""
    created: str = ""
    """UTC, ISO 8601."""
    sha256: str = ""
    """Hash of all other fields, hex."""
    rows: int
    """Tiles, deleted ones too."""
    width: int
    """Numbers of a tile's vector."""
    preprocess: str
    """Name of the decoding and resizing."""
    model: str
    """Fingerprint of the matcher; names its directory below `matcher/`."""
    model_parts: Mapping[str, str]
    """Fingerprints of its parts (`fingerprint_parts`)."""
    config: Mapping[str, object]
    """Settings of the build."""
    shard_rows: int
    """Tiles of a full shard."""
    shards: tuple[ShardInfo, ...]
    shortlist_dir: str = ""
    """Name below `shortlist/`."""
    ann: AnnInfo
    shortlist: int
    """Tiles that a two-stage search re-ranks."""
    deleted: str | None = None
    """File of the deleted rows."""
    check_samples: str | None = None
    """File of the tiles that are embedded again to verify the index."""
    tile_origin: TileOrigin | None = None
    """None: the tiles are of several builds."""
    request: str | None = None
    """Fingerprint of all that the build depended on but for its tiles."""
    queries: QueryOrigin = QueryOrigin()
    recall: Recall | None = None
    """None: not measured."""
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    """By the modality of a query; none where there were too few queries of tiles that are there."""
    rejected: int = 0
    """Rows that failed, and are no tiles."""
    identical_tiles: int = 0
    """Tiles whose vector others have, too, when they were written."""
    identical: tuple[IdenticalTiles, ...] = ()
    """The largest groups of these."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of each stage of the build."""
    tiles_per_s: Mapping[str, float] = field(default_factory=dict)
    """Of each stage of the build."""
    bytes_per_tile: BytesPerTile | None = None
    files: Files = field(default_factory=dict)
    """All files of the version but this one."""

    @property
    def tower(self) -> str:
        """Fingerprint of the part of the matcher that embedded the tiles."""
        return self.model_parts["tile"]

    def select_files(self, *folders: str) -> Files:
        """Return the files below some folders of the index."""
        begins = tuple(f"{folder}/" for folder in folders)
        return {name: info for name, info in self.files.items() if name.startswith(begins)}

    def check_rows(self, uri: str) -> None:
        """Check that shards, and parts of the shortlist, are there once and cover the rows.

        Raises:
            ValueError: they do not; says at which rows they begin.
        """
        names = [shard.sha for shard in self.shards]
        twice = sorted({name for name in names if names.count(name) > 1})
        for pieces in (self.shards, self.ann.parts):
            starts = [0, *itertools.accumulate(piece.rows for piece in pieces)]
            got = [*(piece.row_start for piece in pieces), self.rows]
            if twice or starts != got:
                raise ValueError(
                    f"index {uri}: expected shards (or parts of the shortlist) that begin at rows "
                    f"{starts[:-1]} and end at {starts[-1]}, each once; got {got}"
                    f"{f', and {twice} twice' if twice else ''}. Build the index again: "
                    f"cvmatch build-index --output {uri}"
                )

    def plain(self) -> dict[str, object]:
        """Return it as values of JSON."""
        return dataclasses.asdict(self)

    def summary(self) -> dict[str, object]:
        """Return it as values of JSON, without the list of files."""
        return {name: value for name, value in self.plain().items() if name != "files"}

    def sign(self) -> "IndexManifest":
        """Return it with its `sha256`."""
        return dataclasses.replace(self, sha256=_digest(self.plain()))

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(self.plain(), indent=2, sort_keys=True) + "\n"


def read_manifest(path: str) -> IndexManifest:
    """Read `manifest.json`.

    Raises:
        ValueError: of another format, or changed since it was written.
    """
    root = path.partition("/versions/")[0]
    again = f"Build it again with: cvmatch build-index --output {root}"
    with open(path, encoding="utf-8") as file:
        plain = json.load(file)
    if plain.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected an index of format {FORMAT}, got {plain.get('format')}, of another "
            f"version of cvmatch. {again}"
        )
    if plain["sha256"] != (digest := _digest(plain)):
        raise ValueError(
            f"{path}: expected sha256 {plain['sha256']}, got {digest}: the manifest was changed. "
            f"{again}"
        )
    return _decode(plain)


def _decode(plain: dict[str, Any]) -> IndexManifest:
    ann = plain["ann"]
    origin, recall, size = plain["tile_origin"], plain["recall"], plain["bytes_per_tile"]
    fields = {
        "shards": tuple(ShardInfo(**shard) for shard in plain["shards"]),
        "ann": AnnInfo(ann["key"], ann["nprobe"], tuple(AnnPartInfo(**p) for p in ann["parts"])),
        "queries": QueryOrigin(**plain["queries"]),
        "tile_origin": TileOrigin(**origin) if origin else None,
        "recall": Recall(**recall) if recall else None,
        "calibrations": {
            modality: Calibration(**known)
            for modality, known in plain.get("calibrations", {}).items()
        },
        "identical": tuple(
            IdenticalTiles(one["tiles"], tuple(one["pair_ids"]))
            for one in plain.get("identical", ())
        ),
        "bytes_per_tile": BytesPerTile(**size) if size else None,
        "files": {name: FileInfo(**info) for name, info in plain["files"].items()},
    }
    return IndexManifest(**plain | fields)


def _digest(plain: Mapping[str, object]) -> str:
    rest = {name: value for name, value in plain.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
