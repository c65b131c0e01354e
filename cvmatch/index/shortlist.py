"""The shortlist: a head that makes vectors of tiles and queries, and their codes in FAISS.

The exact model re-ranks what the codes find, so they need the right tiles among their K best and
not in the right order: 4-bit product codes of some 32 bytes a tile suffice
(docs/decisions.md#shortlist-codes). The codes of each shard are made from one trained, empty index,
as array lists, whose bytes do not depend on who makes them; then merged in the order of the shards,
and packed for fast scans.

The head makes a tile's vector of its projection alone. The matcher has one of its own, exact for
queries of G; a distilled one is smaller (docs/decisions.md#shortlist-head).
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import faiss
import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.match.fusion import Fusion, Query
from cvmatch.match.scoring import joint_scores

HEAD_WIDTH = 128
"""Numbers of a distilled vector."""

STEPS = 600
"""Steps of the distillation, each of 64 queries and 1,024 tiles."""

_QUERIES, _TILES = 64, 1024
_SHARPNESS = 50.0  # of the joint's softmax over tiles
_LR = 2e-3
_CONFIG, _WEIGHTS = "head.json", "head.safetensors"

EMPTY_INDEX = "empty_index.faiss"
"""In a directory below `shortlist/`: the trained, empty FAISS index."""

_TRAINING = 65_536  # vectors that train codebooks

_PER_LIST = 50  # training vectors for each list of an IVF; FAISS warns below 39
_CODES = (64, 32, 16, 8)
_MERGEABLE = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexPQ, faiss.IndexIVF)
_PACKED = (faiss.IndexPQFastScan, faiss.IndexIVFPQFastScan)


@runtime_checkable
class ShortlistHead(Protocol):
    """Both sides of the shortlist; their product ranks tiles for a query."""

    @property
    def device(self) -> torch.device:
        """Where the vectors are computed."""
        ...

    def tile(self, tile_proj: Float[Tensor, "tile hidden"]) -> Float[Tensor, "tile width"]:
        """Unit vectors of tiles."""
        ...

    def query(self, query: Query) -> Float[Tensor, "query width"]:
        """Unit vectors of queries."""
        ...

    def save(self, directory: str) -> None:
        """Write what `load_head` reads."""
        ...


class MatcherHead:
    """The matcher's own: tiles under the null synthetic aerial."""

    def __init__(self, matcher: Fusion) -> None:
        self.matcher = matcher

    @property
    def device(self) -> torch.device:
        """The matcher's."""
        return self.matcher.device

    def tile(self, tile_proj: Float[Tensor, "tile hidden"]) -> Float[Tensor, "tile hidden"]:
        """Candidate embeddings."""
        return self.matcher.shortlist_embedding(tile_proj)

    def query(self, query: Query) -> Float[Tensor, "query hidden"]:
        """Query embeddings."""
        return query.embedding

    def save(self, directory: str) -> None:
        """Write `head.json`: the weights are the matcher's."""
        _save(directory, {"kind": "matcher"})


class DistilledHead(nn.Module):
    """Two towers, each a linear map plus two layers."""

    def __init__(self, hidden: int, width: int = HEAD_WIDTH) -> None:
        super().__init__()
        self.hidden, self.width = hidden, width
        self.tile_linear, self.tile_mlp = nn.Linear(hidden, width), _mlp(hidden, width)
        self.query_linear, self.query_mlp = nn.Linear(2 * hidden, width), _mlp(2 * hidden, width)
        self.sharpness = nn.Parameter(torch.tensor(20.0).log())

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.sharpness.device

    def tile(self, tile_proj: Float[Tensor, "tile hidden"]) -> Float[Tensor, "tile width"]:
        """Unit vectors of tiles."""
        return F.normalize(self.tile_linear(tile_proj) + self.tile_mlp(tile_proj), dim=-1)

    def query(self, query: Query) -> Float[Tensor, "query width"]:
        """Unit vectors of queries, from embedding and query_proj."""
        x = torch.cat([query.embedding, query.query_proj], dim=-1).float()
        return F.normalize(self.query_linear(x) + self.query_mlp(x), dim=-1)

    def save(self, directory: str) -> None:
        """Write `head.json` and `head.safetensors`."""
        _save(directory, {"kind": "distilled", "hidden": self.hidden, "width": self.width})
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, os.path.join(directory, _WEIGHTS))


def load_head(directory: str, matcher: Fusion) -> ShortlistHead:
    """Load the head that `save` wrote, on the matcher's device."""
    with open(os.path.join(directory, _CONFIG), encoding="utf-8") as file:
        plain = json.load(file)
    if plain.pop("kind") == "matcher":
        return MatcherHead(matcher)
    head = DistilledHead(**plain)
    head.load_state_dict(load_file(os.path.join(directory, _WEIGHTS)))
    return head.to(matcher.device).eval()


def distil(
    matcher: Fusion,
    queries: Query,
    tile_proj: Float16[np.ndarray, "tile hidden"],
    seed: int = 0,
    steps: int = STEPS,
) -> DistilledHead:
    """Train a head to rank tiles as the joint score does: listwise KL, a new sample each step.

    Queries need no known tile. `tile_proj`: a sample of the gallery.
    """
    device = queries.query_proj.device
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DistilledHead(matcher.hidden).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), _LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    for _ in range(steps):
        query_rows = torch.randint(len(queries.query_proj), (_QUERIES,), generator=random)
        tile_rows = torch.randint(len(tile_proj), (_TILES,), generator=random).numpy()
        query = queries.rows(query_rows.to(device))
        tiles = torch.from_numpy(tile_proj[tile_rows]).float().to(device)
        target = (_SHARPNESS * joint_scores(matcher, query, tiles)).log_softmax(dim=1)
        scores = head.sharpness.exp() * head.query(query) @ head.tile(tiles).T
        loss = F.kl_div(scores.log_softmax(dim=1), target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


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
    """Choose how many tiles the exact model re-ranks: as many as kept its first answer."""
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


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 2 * HEAD_WIDTH), nn.ReLU(), nn.Linear(2 * HEAD_WIDTH, width)
    )


def _save(directory: str, plain: dict[str, object]) -> None:
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, _CONFIG), "w", encoding="utf-8") as file:
        json.dump(plain, file, sort_keys=True)


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
