"""An index, opened for searching."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64
from torch import Tensor

from cvmatch.data import geography, manifest, schema
from cvmatch.data.images import PREPROCESS
from cvmatch.index import ann, remote, shard, shortlist_head, versions
from cvmatch.index.shortlist_head import Head
from cvmatch.match.fusion import Fusion, Query
from cvmatch.match.model import fingerprint_parts, load_fusion
from cvmatch.match.scoring import joint_scores
from cvmatch.runtime import hardware

EXHAUSTIVE = 100_000
"""Tiles up to which a search scores them all: 0.12 s a query on two cores (index.md, section 2)."""

TEMPLATE = "template.faiss"
"""In the directory of the shortlist head: the trained, empty FAISS index."""


@dataclass(frozen=True)
class Index:
    """A version of an index, opened for searching."""

    tile_proj: shard.Store
    """What is stored of each tile, memory-mapped."""
    tiles: pa.Table
    """pair_id, latitude and longitude (degrees or null) of each row of tile_proj, memory-mapped."""
    ann: list[ann.Part]
    """Shortlist: scores are cosines of the head's vectors."""
    head: Head
    """What these vectors are."""
    dead: Int64[np.ndarray, " row"]
    """Rows that were deleted, sorted."""
    matcher: Fusion
    """What scores need of the model that made tile_proj, in evaluation mode."""
    manifest: dict[str, Any]
    """What the version consists of, and what was measured."""
    heads: str
    """Local directory of the model."""

    def __len__(self) -> int:
        return len(self.tile_proj)

    @classmethod
    def open(cls, uri: str, model: str = "", version: str = "", deep: bool = False) -> "Index":
        """The current version of the index at `uri`, or the one named.

        `model`: a matcher directory that has to be the one that built it. `deep` hashes large files
        too, where only their sizes are checked else. An index in an object store is copied to a
        local cache first.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: of another format, model or preprocessing, truncated or changed.
        """
        root = remote.fetched(uri, version)
        info = versions.read(root, version)
        _check_maker(uri, info, model)
        versions.check(root, info["files"], deep)
        _check_rows(uri, info)
        return opened(root, info)

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        return self.matcher.device

    @property
    def living(self) -> Int64[np.ndarray, " row"]:
        """Rows that were not deleted."""
        return np.setdiff1d(np.arange(len(self)), self.dead, assume_unique=True)

    def about(self, rows: Int64[np.ndarray, " row"]) -> list[dict[str, Any]]:
        """pair_id, latitude and longitude of some tiles.

        Not by `take`, which joins all ids for each answer: at 10 million 125 MB and 4.5 ms.
        """
        return [self.tiles.slice(row, 1).to_pylist()[0] for row in rows.tolist()]

    @property
    def living_ids(self) -> pa.Array:
        """pair_id of each of the `living`."""
        return self.tiles[schema.PAIR_ID].take(pa.array(self.living)).combine_chunks()

    def scores(
        self,
        query: Query,
        dtype: torch.dtype = torch.float32,
        rows: Int64[np.ndarray, " row"] | None = None,
    ) -> Iterator[Float[Tensor, "query part"]]:
        """Scores of all tiles (or of some) in the order of the rows, a part of them at a time.

        Exact but for the rounding of tile_proj to half precision (3e-4), and of `dtype`; -inf of
        deleted tiles.
        """
        begin = 0
        for part in self._parts(rows):
            score = joint_scores(self.matcher, query, self._tensor(part), dtype)
            own = np.arange(begin, begin + len(part)) if rows is None else rows[begin:][: len(part)]
            if (dead := self._is_dead(own)).any():
                score[:, torch.from_numpy(dead).to(score.device)] = -torch.inf
            yield score
            begin += len(part)

    def of_rows(self, query: Query, rows: Int64[np.ndarray, " row"]) -> Float[Tensor, "query row"]:
        """Scores in fp32 of some tiles."""
        return joint_scores(self.matcher, query, self._tensor(self.tile_proj.take(rows)))

    def nearest(self, query: Query, count: int = 0) -> Int64[np.ndarray, "query found"]:
        """Rows of the shortlist, best first, -1 behind the end.

        `count`: 0 takes the number that the index was built for.
        """
        count = min(count or self.manifest["shortlist"], len(self))
        with torch.inference_mode():
            vectors = self.head.query(query).float().cpu().numpy()
        if not len(self.dead):
            return ann.search(self.ann, vectors, count)
        rows = self._with_dead(vectors, count)
        rows[self._is_dead(rows)] = -1
        behind = np.argsort(rows < 0, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(rows, behind, axis=1)

    def inside(self, area: geography.Area) -> Int64[np.ndarray, " row"]:
        """Rows of tiles in an area; one without coordinates is in none."""
        places = (self.tiles[name].to_numpy() for name in (schema.LATITUDE, schema.LONGITUDE))
        rows = np.flatnonzero(area.contains(*places))
        return rows[~self._is_dead(rows)]

    def _with_dead(
        self, vectors: Float32[np.ndarray, "query width"], count: int
    ) -> Int64[np.ndarray, "query found"]:
        """Rows of the shortlist of which `count` are living, or all that FAISS finds."""
        most, asked = min(len(self), count + len(self.dead)), count
        while True:
            asked = min(2 * asked, most)
            rows = ann.search(self.ann, vectors, asked)
            living = (rows >= 0) & ~self._is_dead(rows)
            more = (living.sum(axis=1) < count) & (rows >= 0).all(axis=1)  # -1: its lists are empty
            if asked == most or not more.any():
                return rows

    def _parts(
        self, rows: Int64[np.ndarray, " row"] | None
    ) -> Iterator[Float16[np.ndarray, "_ h"]]:
        if rows is None:
            yield from self.tile_proj.parts()
            return
        for begin in range(0, len(rows), shard.CHUNK):
            yield self.tile_proj.take(rows[begin : begin + shard.CHUNK])

    def _tensor(self, part: Float16[np.ndarray, "row hidden"]) -> Float16[Tensor, "row hidden"]:
        if not part.flags.writeable:  # memory-mapped: torch wants to be told that it may not write
            part = part.copy()
        return torch.from_numpy(part).to(self.device)

    def _is_dead(self, rows: Int64[np.ndarray, "*row"]) -> Bool[np.ndarray, "*row"]:
        return np.isin(rows, self.dead) if len(self.dead) else np.zeros(rows.shape, bool)


def opened(root: str, info: dict[str, Any]) -> Index:
    """The version that `info` describes, without any check."""
    rereads = info["rows"] <= EXHAUSTIVE
    folders = [os.path.join(root, "shards", one["sha"]) for one in info["shards"]]
    arrays, tables = zip(*(shard.read(folder, rereads) for folder in folders), strict=True)
    heads = os.path.join(root, "heads", info["model"])
    matcher = load_fusion(heads, hardware.device())
    return Index(
        tile_proj=shard.Store(arrays),
        tiles=pa.concat_tables(tables),
        ann=[_part(root, one, info["ann"]["probes"]) for one in info["ann"]["parts"]],
        head=shortlist_head.load(os.path.join(root, "coarse", info["coarse"]), matcher),
        dead=np.load(os.path.join(root, info["deleted"])) if info["deleted"] else _NONE,
        matcher=matcher,
        manifest=info,
        heads=heads,
    )


_NONE = np.empty(0, np.int64)


def _part(root: str, entry: dict[str, Any], probes: int) -> ann.Part:
    index = faiss.read_index(os.path.join(root, entry["file"]))
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = probes
    if index.ntotal != entry["rows"]:
        raise ValueError(
            f"index {root}: {entry['file']} holds {index.ntotal} tiles, expected {entry['rows']}. "
            f"Build the index again: jobs/build_index.py --output {root}"
        )
    return ann.Part(index, entry["row_start"])


def _check_rows(uri: str, info: dict[str, Any]) -> None:
    """Shards, and parts of the shortlist, are there once each and cover the rows without a gap."""
    names = [one["sha"] for one in info["shards"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    for what in (info["shards"], info["ann"]["parts"]):
        starts = np.cumsum([0, *(one["rows"] for one in what)]).tolist()
        given = [*(one["row_start"] for one in what), info["rows"]]
        if twice or starts != given:
            raise ValueError(
                f"index {uri}: expected shards (or parts of the shortlist) that begin at rows "
                f"{starts[:-1]} and end at {starts[-1]}, each once; got {given}"
                f"{f', and {twice} twice' if twice else ''}. Build the index again: "
                f"jobs/build_index.py --output {uri}"
            )


def _check_maker(uri: str, info: dict[str, Any], model: str) -> None:
    if info["preprocess"] != PREPROCESS:
        raise ValueError(
            f"index {uri}: expected preprocessing {info['preprocess']}, but this version of "
            f"cvmatch has {PREPROCESS}. Build it again: jobs/build_index.py --output {uri}"
        )
    if model and (got := manifest.fingerprint(model)) != info["model"]:
        other = {
            name: value
            for name, value in fingerprint_parts(model).items()
            if value != info["parts"][name]
        }
        kept = "" if "tile" in other else " (no tile is embedded again: that part is the same)"
        raise ValueError(
            f"index {uri}: expected matcher {info['model']}, got {got} (of {model}); these parts "
            f"differ: {sorted(other)}. Search with the model that built it (leave --model out), or "
            f"build the index again{kept}: jobs/build_index.py --model {model} --output {uri}"
        )
