"""The shortlist: codes in FAISS of the tiles' vectors.

The exact score re-ranks what the codes find, so they need the right tiles among their K best and
not in the right order: 4-bit product codes of some 32 bytes a tile suffice
(docs/decisions.md#shortlist-codes). The codes of each shard are made from one trained, empty index,
as array lists, whose bytes do not depend on who makes them; then merged in the order of the shards,
and packed for fast scans.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from jaxtyping import Float32, Int64

EMPTY_INDEX = "empty_index.faiss"
"""In a directory below `shortlist/`: the trained, empty FAISS index."""

_TRAINING = 65_536  # vectors that train codebooks

_PER_LIST = 50  # training vectors for each list of an IVF; FAISS warns below 39
_CODES = (64, 32, 16, 8)
_MERGEABLE = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexPQ, faiss.IndexIVF)
_PACKED = (faiss.IndexPQFastScan, faiss.IndexIVFPQFastScan)


@dataclass(frozen=True)
class AnnPart:
    """Consecutive tiles of the index in FAISS."""

    index: faiss.Index
    """Ids count from 0."""
    row_start: int
    """Row of the first."""


def default_factory_key(rows: int, width: int) -> str:
    """Choose a FAISS factory key for `rows` vectors of `width` numbers.

    Up to 10 million, scanning all codes costs at most some 20 ms and has no recall to tune; beyond,
    lists. Few vectors, or of a width that product codes do not divide, stay as they are.
    """
    codes = next((m for m in _CODES if width % m == 0 and width >= 2 * m), 0)
    if rows <= 2_000 or not codes:
        return "Flat"
    if rows <= 10_000_000:
        return f"PQ{codes}x4"
    return f"IVF{16_384 if rows <= 100_000_000 else 65_536},PQ{codes}x4"


def default_shortlist_size(rows: int) -> int:
    """Choose how many tiles are re-ranked where no queries measure it."""
    return min(rows, 1_000 if rows <= 200_000 else 4_000 if rows <= 10_000_000 else 10_000)


def training_size(key: str, width: int) -> int:
    """Return how many vectors `train_empty_index` needs. Raises as it does."""
    index = _untrained(key, width)
    if index.is_trained:
        return 1
    return max(_TRAINING, _PER_LIST * (index.nlist if isinstance(index, faiss.IndexIVF) else 0))


def train_empty_index(key: str, vectors: Float32[np.ndarray, "row width"]) -> faiss.Index:
    """Train an index of the factory key `key`, and leave it empty.

    Raises:
        ValueError: FAISS does not know the key, it does not fit the vectors, or shards of its kind
            cannot be merged.
    """
    index = _untrained(key, vectors.shape[1])
    try:
        if not index.is_trained:
            index.train(np.ascontiguousarray(vectors))
    except RuntimeError as error:
        raise ValueError(_unfit(key, vectors.shape[1], str(error))) from error
    return index


def encode(
    empty_index: faiss.Index, chunks: Iterable[Float32[np.ndarray, "_ width"]]
) -> faiss.Index:
    """Add vectors to a copy of the empty index; ids count from 0."""
    index = copy_index(empty_index)
    for vectors in chunks:
        index.add(np.ascontiguousarray(vectors))
    return index


def merge_codes(empty_index: faiss.Index, codes: Iterable[faiss.Index]) -> faiss.Index:
    """Put all codes one shard behind the other, packed for fast scans.

    FAISS merges whatever has the same size, and then returns nothing or the wrong tiles without a
    word; so each shard's codebooks and lists are compared with those of the empty index.

    Raises:
        ValueError: codes that were not made with this empty index.
    """
    whole = copy_index(empty_index)
    expected = faiss.serialize_index(empty_index)
    for number, index in enumerate(codes):
        if not np.array_equal(faiss.serialize_index(_reset(index)), expected):
            raise ValueError(
                f"index: the codes of shard {number} were not made with the empty index of this "
                "one: their codebooks or lists differ, and every search in them would be wrong. "
                "Build the index again: cvmatch build-index"
            )
        if isinstance(whole, faiss.IndexIVF):
            whole.merge_from(index, whole.ntotal)
        else:
            whole.merge_from(index)
    return _pack(whole)


def search_parts(
    parts: Sequence[AnnPart], queries: Float32[np.ndarray, "query width"], count: int
) -> Int64[np.ndarray, "query near"]:
    """Return the rows of the nearest `count` tiles, best first; -1 where lists held fewer."""
    queries = np.ascontiguousarray(queries)
    scores, rows = [], []
    for part in parts:
        similarity, ids = part.index.search(queries, min(count, part.index.ntotal))
        scores.append(np.where(ids < 0, -np.inf, similarity))
        rows.append(np.where(ids < 0, -1, ids + part.row_start))
    if len(parts) == 1:
        return rows[0]
    order = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")[:, :count]
    return np.take_along_axis(np.concatenate(rows, axis=1), order, axis=1)


def copy_index(index: faiss.Index) -> faiss.Index:
    """Copy an index; the copy shares nothing with it."""
    return faiss.deserialize_index(faiss.serialize_index(index))


def _untrained(key: str, width: int) -> faiss.Index:
    try:
        index = faiss.index_factory(width, key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(_unfit(key, width, str(error))) from error
    if not isinstance(index, _MERGEABLE) or isinstance(index, _PACKED):
        raise ValueError(
            _unfit(key, width, "its shards cannot be merged (4-bit codes are packed at the end)")
        )
    if isinstance(index, faiss.IndexPQ):
        # 12 of 13 CPU seconds, and nothing uses it: docs/decisions.md#shortlist-codes
        setattr(index, "do_polysemous_training", False)  # noqa: B010 (not in faiss's stubs)
    return index


def _unfit(key: str, width: int, why: str) -> str:
    return (
        f"FAISS key {key!r} does not fit vectors of {width} numbers: {why}. Use --key auto, or a "
        "key such as PQ64x4 or IVF16384,PQ64x4."
    )


def _reset(index: faiss.Index) -> faiss.Index:
    index = copy_index(index)
    index.reset()
    return index


def _pack(index: faiss.Index) -> faiss.Index:
    if isinstance(index, faiss.IndexIVFPQ) and index.pq.nbits == 4:
        packed = faiss.IndexIVFPQFastScan(index)
    elif isinstance(index, faiss.IndexPQ) and index.pq.nbits == 4:
        packed = faiss.IndexPQFastScan(index)  # pyright: ignore[reportArgumentType] (its stubs)
    else:
        return index
    return copy_index(packed)  # which owns its coarse quantizer: `packed` borrows that of `index`
