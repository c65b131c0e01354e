"""Unit vectors -> FAISS indices by inner product: which kind at which size, and their making.

The exact model re-ranks what they find, so they need the right tiles among their K best and not in
the right order: 4-bit product codes of some 32 bytes a tile suffice (index.md, sections 3 and 4).

One trained, empty template; the codes of each shard made from it, as array lists, whose bytes do
not depend on who makes them; these merged in the order of the shards; and packed for fast scans,
7 times less CPU a query at the same codes (index.md, section 5).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float32, Int64

TRAINING = 65_536
"""Vectors that train codebooks: 0.7 CPU seconds, and more of them gain nothing (index.md, 4)."""

_PER_LIST = 50  # training vectors for each list of an IVF; FAISS warns below 39
_CODES = (64, 32, 16, 8)
_MERGE = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexPQ, faiss.IndexIVF)
_PACKED = (faiss.IndexPQFastScan, faiss.IndexIVFPQFastScan)


class Part(NamedTuple):
    """Consecutive tiles of the index in FAISS."""

    index: faiss.Index
    """Ids count from 0."""
    row_start: int
    """Row of the first."""


def default_factory_key(rows: int, width: int) -> str:
    """FAISS factory key for `rows` vectors of `width` numbers.

    Up to 10 million, scanning all codes costs at most some 20 ms and has no recall to tune; beyond,
    lists. Few vectors, or of a width that product codes do not divide, stay as they are.
    """
    parts = next((m for m in _CODES if width % m == 0 and width >= 2 * m), 0)
    if rows <= 2_000 or not parts:
        return "Flat"
    if rows <= 10_000_000:
        return f"PQ{parts}x4"
    return f"IVF{16_384 if rows <= 100_000_000 else 65_536},PQ{parts}x4"


def default_shortlist_size(rows: int) -> int:
    """Tiles that the exact model re-ranks: what kept its first answer in index.md, section 3."""
    return min(rows, 1_000 if rows <= 200_000 else 4_000 if rows <= 10_000_000 else 10_000)


def training(key: str, width: int) -> int:
    """Vectors that `template` wants.

    Raises:
        ValueError: see `template`.
    """
    index = _empty(key, width)
    if index.is_trained:
        return 1
    return max(TRAINING, _PER_LIST * (index.nlist if isinstance(index, faiss.IndexIVF) else 0))


def template(key: str, vectors: Float32[np.ndarray, "row width"]) -> faiss.Index:
    """A trained, empty index of the factory key `key`.

    Raises:
        ValueError: FAISS does not know the key, it does not fit the vectors, or shards of its kind
            cannot be merged.
    """
    index = _empty(key, vectors.shape[1])
    try:
        if not index.is_trained:
            index.train(np.ascontiguousarray(vectors))
    except RuntimeError as error:
        raise ValueError(_unfit(key, vectors.shape[1], str(error))) from error
    return index


def encoded(template: faiss.Index, chunks: Iterable[Float32[np.ndarray, "_ width"]]) -> faiss.Index:
    """The codes of vectors, by the template; ids count from 0."""
    index = clone(template)
    for vectors in chunks:
        index.add(np.ascontiguousarray(vectors))
    return index


def merged(template: faiss.Index, codes: Iterable[faiss.Index]) -> faiss.Index:
    """All codes, one shard behind the other, packed for fast scans.

    FAISS takes whatever has the same size, and then finds nothing or the wrong tiles without a word
    (index.md, section 5); so each shard's codebooks and lists are compared with the template's.

    Raises:
        ValueError: codes that were not made by this template.
    """
    whole = clone(template)
    wanted = faiss.serialize_index(template)
    for number, index in enumerate(codes):
        if not np.array_equal(faiss.serialize_index(_emptied(index)), wanted):
            raise ValueError(
                f"index: the codes of shard {number} were not made by the template of this index: "
                "their codebooks or lists differ, and every search in them would be wrong. Build "
                "the index again: jobs/build_index.py"
            )
        if isinstance(whole, faiss.IndexIVF):
            whole.merge_from(index, whole.ntotal)
        else:
            whole.merge_from(index)
    return _packed(whole)


def search(
    parts: Sequence[Part], queries: Float32[np.ndarray, "query width"], count: int
) -> Int64[np.ndarray, "query found"]:
    """Rows of the nearest `count` tiles of all parts, best first; -1 where lists held fewer."""
    queries = np.ascontiguousarray(queries)
    scores, rows = [], []
    for index, row_start in parts:
        found, ids = index.search(queries, min(count, index.ntotal))
        scores.append(np.where(ids < 0, -np.inf, found))
        rows.append(np.where(ids < 0, -1, ids + row_start))
    if len(parts) == 1:
        return rows[0]
    order = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")[:, :count]
    return np.take_along_axis(np.concatenate(rows, axis=1), order, axis=1)


def clone(index: faiss.Index) -> faiss.Index:
    """A copy that shares nothing with `index`."""
    return faiss.deserialize_index(faiss.serialize_index(index))


def _empty(key: str, width: int) -> faiss.Index:
    try:
        index = faiss.index_factory(width, key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(_unfit(key, width, str(error))) from error
    if not isinstance(index, _MERGE) or isinstance(index, _PACKED):
        raise ValueError(
            _unfit(key, width, "its shards cannot be merged (4-bit codes are packed at the end)")
        )
    if isinstance(index, faiss.IndexPQ):
        # Ordering codes for Hamming distance takes 12 of 13 CPU seconds, and nothing uses it.
        setattr(index, "do_polysemous_training", False)  # noqa: B010 (not in faiss's stubs)
    return index


def _unfit(key: str, width: int, why: str) -> str:
    return (
        f"FAISS key {key!r} does not fit vectors of {width} numbers: {why}. Use --key auto, or a "
        "key such as PQ64x4 or IVF16384,PQ64x4."
    )


def _emptied(index: faiss.Index) -> faiss.Index:
    index = clone(index)
    index.reset()
    return index


def _packed(index: faiss.Index) -> faiss.Index:
    if isinstance(index, faiss.IndexIVFPQ) and index.pq.nbits == 4:
        packed = faiss.IndexIVFPQFastScan(index)
    elif isinstance(index, faiss.IndexPQ) and index.pq.nbits == 4:
        packed = faiss.IndexPQFastScan(index)  # pyright: ignore[reportArgumentType] (its stubs)
    else:
        return index
    return clone(packed)  # which owns its coarse quantizer: `packed` borrows that of `index`
