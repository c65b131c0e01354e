"""An index, opened for searching; the best tiles of queries by exact scores, of all or a shortlist.

Exact search scores all tiles, two-stage search those that FAISS finds nearest to the query.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64
from torch import Tensor

from cvmatch.data import geography, schema
from cvmatch.data.images import PREPROCESSINGS
from cvmatch.index import shard, versions
from cvmatch.index.manifest import AnnPartInfo, IndexManifest
from cvmatch.index.settings import Mode
from cvmatch.index.shortlist import AnnPart, search_parts
from cvmatch.match.heads.branches import SumScorer
from cvmatch.match.model import Scorer, fingerprint_parts, load_scorer, read_config
from cvmatch.match.settings import Modality
from cvmatch.nn.calibration import Calibration
from cvmatch.runtime import hardware

MAX_EXACT_TILES = 100_000
"""Tiles up to which `auto` scores all: docs/decisions.md#exact-search-up-to-100000-tiles"""

_SPARE = 64  # tiles that are scored again in fp32, at least


class Tile(TypedDict):
    """A tile's name and place."""

    pair_id: str
    latitude: float | None
    """Degrees, like the longitude; None: not known."""
    longitude: float | None


@dataclass(frozen=True)
class Index:
    """A version of an index, opened for searching."""

    vectors: shard.ShardedArray
    """What is stored of each tile, memory-mapped."""
    tiles: pa.Table
    """pair_id, latitude and longitude (degrees or null) of each row of vectors, memory-mapped."""
    ann: list[AnnPart]
    """Codes of the shortlist."""
    deleted: Int64[np.ndarray, " row"]
    """Rows that were deleted, sorted."""
    scorer: Scorer
    """What scores the vectors, of the model that made them."""
    manifest: IndexManifest
    """What the version consists of, and what was measured."""
    matcher_dir: str
    """Local directory of the whole model."""

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def open(cls, uri: str, model: str = "", version: str = "", deep: bool = False) -> "Index":
        """Open the current version of the index at `uri`, or the one named.

        `model`: a matcher directory that has to be the one that built it. `deep` hashes large files
        too, where only their sizes are checked else. An index in an object store is copied to a
        local cache first.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: of another format, model or preprocessing, truncated or changed.
        """
        root = versions.fetch(uri, version)
        manifest = versions.read_version(root, version)
        _check_model(uri, manifest, model)
        versions.check_files(root, manifest.files, deep)
        manifest.check_rows(uri)
        return open_version(root, manifest)

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        return self.scorer.device

    @property
    def live_rows(self) -> Int64[np.ndarray, " row"]:
        """Rows that were not deleted."""
        return np.setdiff1d(np.arange(len(self)), self.deleted, assume_unique=True)

    @property
    def live_ids(self) -> pa.Array:
        """pair_id of each of the `live_rows`."""
        return self.tiles[schema.PAIR_ID].take(pa.array(self.live_rows)).combine_chunks()

    def calibration_of(self, modality: Modality) -> Calibration | None:
        """Return what makes scores of such queries probabilities; None: too few queries fitted it.

        What the model does not look at is no part of a query.
        """
        letters = read_config(self.matcher_dir).letters
        seen = "+".join(letter for letter in modality.split("+") if letter in letters)
        return self.manifest.calibrations.get(seen)

    def describe(self, rows: Int64[np.ndarray, " row"]) -> list[Tile]:
        """Return the names and places of some tiles."""
        # Not by `take`: docs/decisions.md#names-of-tiles-are-looked-up-one-by-one
        return [self.tiles.slice(row, 1).to_pylist()[0] for row in rows.tolist()]

    def rows_inside(self, area: geography.Area) -> Int64[np.ndarray, " row"]:
        """Return the rows of tiles in an area; one without coordinates is in none."""
        coordinates = (self.tiles[n].to_numpy() for n in (schema.LATITUDE, schema.LONGITUDE))
        rows = np.flatnonzero(area.contains(*coordinates))
        return rows[~self._is_deleted(rows)]

    def iter_scores(
        self,
        query: Float[Tensor, "query width"],
        dtype: torch.dtype = torch.float32,
        rows: Int64[np.ndarray, " row"] | None = None,
    ) -> Iterator[Float[Tensor, "query chunk"]]:
        """Score all tiles (or some) in the order of the rows, a chunk of them at a time.

        Exact but for the rounding of vectors to half precision (3e-4), and of `dtype`; -inf of
        deleted tiles.
        """
        begin = 0
        for chunk in self._chunks(rows):
            score = self.scorer(query, self._tensor(chunk), dtype)
            end = begin + len(chunk)
            deleted = self._is_deleted(np.arange(begin, end) if rows is None else rows[begin:end])
            if deleted.any():
                score[:, torch.from_numpy(deleted).to(score.device)] = -torch.inf
            yield score
            begin = end

    def score_rows(
        self, query: Float[Tensor, "query width"], rows: Int64[np.ndarray, " row"]
    ) -> Float[Tensor, "query row"]:
        """Score some tiles in fp32."""
        return self.scorer(query, self._tensor(self.vectors.take(rows)))

    def split_scores(
        self, query: Float[Tensor, " width"], rows: Int64[np.ndarray, " row"]
    ) -> list[dict[str, float]]:
        """Return what each branch adds to the scores of some tiles; nothing for a joint score."""
        if not isinstance(self.scorer, SumScorer):
            return [{} for _ in rows]
        parts = self.scorer.split(query, self._tensor(self.vectors.take(rows)))
        columns = [part.tolist() for part in parts.values()]
        return [dict(zip(parts, values, strict=True)) for values in zip(*columns, strict=True)]

    def find_nearest(
        self, query: Float[Tensor, "query width"], count: int = 0
    ) -> Int64[np.ndarray, "query near"]:
        """Return the rows of the shortlist, best first, -1 behind the end.

        `count`: 0 takes the number that the index was built for.
        """
        count = min(count or self.manifest.shortlist, len(self))
        vectors = query[:, : self.scorer.shortlist_width].float().cpu().numpy()
        if not len(self.deleted):
            return search_parts(self.ann, vectors, count)
        rows = self._search_past_deleted(vectors, count)
        rows[self._is_deleted(rows)] = -1
        order = np.argsort(rows < 0, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(rows, order, axis=1)

    def _search_past_deleted(
        self, vectors: Float32[np.ndarray, "query width"], count: int
    ) -> Int64[np.ndarray, "query near"]:
        """Return rows of which `count` are live, or all that FAISS finds."""
        most, size = min(len(self), count + len(self.deleted)), count
        while True:
            size = min(2 * size, most)
            rows = search_parts(self.ann, vectors, size)
            live = (rows >= 0) & ~self._is_deleted(rows)
            more = (live.sum(axis=1) < count) & (rows >= 0).all(axis=1)  # -1: its lists are empty
            if size == most or not more.any():
                return rows

    def _chunks(
        self, rows: Int64[np.ndarray, " row"] | None
    ) -> Iterator[Float16[np.ndarray, "_ width"]]:
        if rows is None:
            yield from self.vectors.chunks()
            return
        for begin in range(0, len(rows), shard.CHUNK):
            yield self.vectors.take(rows[begin : begin + shard.CHUNK])

    def _tensor(self, chunk: Float16[np.ndarray, "row width"]) -> Float16[Tensor, "row width"]:
        return torch.from_numpy(chunk).to(self.device)

    def _is_deleted(self, rows: Int64[np.ndarray, "*row"]) -> Bool[np.ndarray, "*row"]:
        return np.isin(rows, self.deleted) if len(self.deleted) else np.zeros(rows.shape, bool)


class TopTiles(NamedTuple):
    """The best tiles of each query, best first."""

    rows: Int64[np.ndarray, "query k"]
    """Rows of the index; -1 behind the end, where a shortlist held fewer than k tiles."""
    scores: Float[np.ndarray, "query k"]
    """Exact scores, in [-1, 1]; -inf where there is no tile."""


def rank(
    index: Index,
    query: Float[Tensor, "query width"],
    top_k: int = 10,
    mode: Mode = "auto",
    shortlist: int = 0,
    rows: Int64[np.ndarray, " row"] | None = None,
) -> TopTiles:
    """Find the best `top_k` tiles (or all, where there are fewer) by the exact score.

    Equal scores are ordered by row.

    Args:
        index: the tiles.
        query: embedded queries.
        top_k: tiles to return for each query.
        mode: exact ranks all tiles; two-stage those whose codes are nearest; auto is
            exact up to MAX_EXACT_TILES.
        shortlist: tiles that two-stage re-ranks; 0: the index's number.
        rows: rank only these, and exactly.
    """
    if rows is not None or mode == "exact" or (mode == "auto" and len(index) <= MAX_EXACT_TILES):
        return _rank_exact(index, query, top_k, rows)
    return _rank_two_stage(index, query, top_k, shortlist)


def rank_best(
    index: Index,
    query: Float[Tensor, "vector width"],
    top_k: int = 10,
    mode: Mode = "auto",
    shortlist: int = 0,
    rows: Int64[np.ndarray, " row"] | None = None,
) -> tuple[TopTiles, Int64[np.ndarray, "1 k"]]:
    """Find the best tiles of one query that has several vectors, of which a tile's best counts.

    Args:
        index: the tiles.
        query: the vectors of the query.
        top_k: tiles to return.
        mode: as of `rank`.
        shortlist: as of `rank`, for each vector.
        rows: as of `rank`.

    Returns:
        The tiles, as of `rank`, and with which vector each was found.
    """
    found = rank(index, query, top_k, mode, shortlist, rows)
    tiles, scores = found.rows.ravel(), found.scores.ravel()
    vectors = np.repeat(np.arange(len(query)), found.rows.shape[1])
    order = np.lexsort((vectors, tiles, -scores))
    _, first = np.unique(tiles[order], return_index=True)
    best = order[np.sort(first)]
    best = best[np.argsort(tiles[best] < 0, kind="stable")][:top_k]  # where there is no tile
    return TopTiles(tiles[best][None], scores[best][None]), vectors[best][None]


@torch.inference_mode()
def _rank_exact(
    index: Index,
    query: Float[Tensor, "query width"],
    top_k: int,
    among: Int64[np.ndarray, " row"] | None = None,
) -> TopTiles:
    """Rank all tiles: in the type that is fastest, then in fp32 those that may be the best."""
    dtype = index.scorer.fastest_dtype(len(query))
    if dtype == torch.float32:
        return _sort(*_best(index, query, top_k, dtype, among), top_k)
    rows, rough = _best(index, query, max(_SPARE, 4 * top_k), dtype, among)
    scores = _score_each(index, query, rows)
    if rows.shape[1] < len(index if among is None else among):
        # A tile that was left out has a rough score of at most the least kept one. Where that could
        # hide one of the best, for all the error that was seen, fp32 decides alone.
        error = np.abs(scores - rough, where=rows >= 0, out=np.zeros_like(scores)).max(axis=1)
        unsure = np.sort(scores, axis=1)[:, -top_k] <= rough.min(axis=1) + 2 * error
        if unsure.any():
            again = query[torch.from_numpy(unsure)]
            count = rows.shape[1]
            rows[unsure], scores[unsure] = _best(index, again, count, torch.float32, among)
    return _sort(rows, scores, top_k)


def _best(
    index: Index,
    query: Float[Tensor, "query width"],
    count: int,
    dtype: torch.dtype,
    among: Int64[np.ndarray, " row"] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the `count` best tiles (or all) by scores in `dtype`, and these; -1 and -inf
    where only deleted tiles are left."""
    best = torch.empty(len(query), 0)
    rows = torch.empty(len(query), 0, dtype=torch.int64)
    begin = 0
    for chunk in index.iter_scores(query, dtype, among):
        best = torch.cat([best, chunk.cpu()], dim=1)
        chunk_rows = torch.arange(begin, begin + chunk.shape[1]).expand(len(best), -1)
        rows = torch.cat([rows, chunk_rows], dim=1)
        begin += chunk.shape[1]
        # Scores of half precision have many ties; fp32 scores what they leave in doubt again.
        best, rows = _top(best, rows, count, ties=dtype == torch.float32)
    tile_rows = rows.numpy() if among is None else among[rows.numpy()]
    return np.where(best.numpy() == -np.inf, -1, tile_rows), best.numpy()


def _top(scores: Tensor, rows: Tensor, count: int, ties: bool) -> tuple[Tensor, Tensor]:
    """Return each query's `count` best scores, and their rows; `ties`: of equal ones the first."""
    best, order = scores.topk(min(count, scores.shape[1]))
    best_rows = rows.gather(1, order)
    if ties:
        least = best[:, -1:]
        cut = ((scores == least).sum(1) > (best == least).sum(1)).nonzero()[:, 0]
        if len(cut):
            first = _sort(rows[cut].numpy(), scores[cut].numpy(), best.shape[1])
            best_rows[cut], best[cut] = torch.from_numpy(first.rows), torch.from_numpy(first.scores)
    return best, best_rows


@torch.inference_mode()
def _rank_two_stage(
    index: Index, query: Float[Tensor, "query width"], top_k: int, shortlist: int
) -> TopTiles:
    near = index.find_nearest(query, max(shortlist or index.manifest.shortlist, top_k))
    return _sort(near, _score_each(index, query, near), top_k)


def _score_each(index: Index, query: Float[Tensor, "query width"], rows: np.ndarray) -> np.ndarray:
    """Score each query's own rows in fp32; -inf where there is none."""
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for number, query_rows in enumerate(rows):
        known = query_rows >= 0
        single = query[number : number + 1]
        scores[number, known] = index.score_rows(single, query_rows[known])[0].cpu()
    return scores


def _sort(rows: np.ndarray, scores: np.ndarray, top_k: int) -> TopTiles:
    order = np.lexsort((rows, -scores))[:, :top_k]
    return TopTiles(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))


def open_version(root: str, manifest: IndexManifest) -> Index:
    """Open the version that a manifest describes, without any check."""
    rereads = manifest.rows <= MAX_EXACT_TILES
    folders = [os.path.join(root, "shards", info.sha) for info in manifest.shards]
    arrays, tables = zip(*(shard.open_shard(folder, rereads) for folder in folders), strict=True)
    matcher_dir = os.path.join(root, "matcher", manifest.model)
    scorer = load_scorer(matcher_dir, hardware.device())
    deleted = np.empty(0, np.int64)
    if manifest.deleted:
        deleted = np.load(os.path.join(root, manifest.deleted))
    return Index(
        vectors=shard.ShardedArray(arrays),
        tiles=pa.concat_tables(tables),
        ann=[_open_part(root, info, manifest.ann.nprobe) for info in manifest.ann.parts],
        deleted=deleted,
        scorer=scorer,
        manifest=manifest,
        matcher_dir=matcher_dir,
    )


def _open_part(root: str, info: AnnPartInfo, nprobe: int) -> AnnPart:
    index = faiss.read_index(os.path.join(root, info.file))
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = nprobe
    if index.ntotal != info.rows:
        raise ValueError(
            f"index {root}: {info.file} holds {index.ntotal} tiles, expected {info.rows}. "
            f"Build the index again: cvmatch build-index --output {root}"
        )
    return AnnPart(index, info.row_start)


def _check_model(uri: str, manifest: IndexManifest, model: str) -> None:
    if manifest.preprocess not in PREPROCESSINGS:
        raise ValueError(
            f"index {uri}: expected preprocessing {manifest.preprocess}, but this version of "
            f"cvmatch has {PREPROCESSINGS}. Build it again: cvmatch build-index --output {uri}"
        )
    if model and (tower := fingerprint_parts(model)["tile"]) != manifest.tower:
        raise ValueError(
            f"index {uri}: expected tiles embedded by {tower} (of {model}), got those of "
            f"{manifest.tower}. Search with the model that built it (leave --model out), or build "
            f"the index again: cvmatch build-index --model {model} --output {uri}"
        )
