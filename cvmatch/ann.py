"""Unit vectors -> a FAISS index of them by inner product: which kind at which size, and its making.

The exact model re-ranks what this finds, so it needs the right tiles among its K best and not in
the right order: 4-bit product codes of some 32 bytes a tile suffice (index.md, sections 3 and 4).
"""

from collections.abc import Callable, Iterator

import faiss
import numpy as np
from jaxtyping import Float, Float32

TRAINING = 65_536
"""Vectors that train codebooks: 0.7 CPU seconds, and more of them gain nothing (index.md, 4)."""

_PER_LIST = 50  # training vectors for each list of an IVF; FAISS warns below 39
_CODES = (64, 32, 16, 8)


def ladder(rows: int, width: int) -> str:
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


def candidates(rows: int) -> int:
    """Tiles that the exact model re-ranks: what kept its first answer in index.md, section 3."""
    return min(rows, 1_000 if rows <= 200_000 else 4_000 if rows <= 10_000_000 else 10_000)


def build(
    key: str,
    take: Callable[[np.ndarray], Float[np.ndarray, "row width"]],
    rows: int,
    seed: int,
    chunk: int = 65_536,
) -> faiss.Index:
    """The FAISS index `key` over `take(arange(rows))`; ids are the rows.

    Built with array lists, whose shards merge byte for byte, and then packed for fast scans: 7
    times less CPU a query at the same codes (index.md, section 5).

    Raises:
        ValueError: FAISS does not know the key, or it does not fit the vectors.
    """
    width = take(np.arange(min(rows, 1))).shape[1]
    try:
        index = faiss.index_factory(width, key, faiss.METRIC_INNER_PRODUCT)
        if isinstance(index, faiss.IndexPQ):
            # Ordering codes for Hamming distance takes 12 of 13 CPU seconds, and nothing uses it.
            setattr(index, "do_polysemous_training", False)  # noqa: B010 (not in faiss's stubs)
        if not index.is_trained:
            lists = index.nlist if isinstance(index, faiss.IndexIVF) else 0
            wanted = min(rows, max(TRAINING, _PER_LIST * lists))
            index.train(take(_drawn(rows, wanted, seed)))
    except RuntimeError as error:
        raise ValueError(
            f"FAISS key {key!r} does not fit {rows} vectors of {width}: {error}. "
            f"Use --key auto (here {ladder(rows, width)})."
        ) from error
    for vectors in _chunks(take, rows, chunk):
        index.add(vectors)
    return _packed(index)


def _drawn(rows: int, count: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def _chunks(
    take: Callable[[np.ndarray], np.ndarray], rows: int, chunk: int
) -> Iterator[Float32[np.ndarray, "row width"]]:
    for begin in range(0, rows, chunk):
        yield np.ascontiguousarray(take(np.arange(begin, min(rows, begin + chunk))))


def _packed(index: faiss.Index) -> faiss.Index:
    if isinstance(index, faiss.IndexIVFPQ) and index.pq.nbits == 4:
        packed = faiss.IndexIVFPQFastScan(index)
    elif isinstance(index, faiss.IndexPQ) and index.pq.nbits == 4:
        packed = faiss.IndexPQFastScan(index)  # pyright: ignore[reportArgumentType] (its stubs)
    else:
        return index
    # A copy owns its coarse quantizer; the packed index borrows that of `index`.
    return faiss.deserialize_index(faiss.serialize_index(packed))
