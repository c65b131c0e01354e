"""Tiles -> an index directory that a search opens by itself: u of each tile, shortlist, model.

    CURRENT                   name of the published version; the only file that ever changes
    versions/v000001/         manifest.json, rejected.jsonl
    shards/<sha>/             u.npy, tiles.parquet, shard.json (`shard`)
    ann/<sha>.faiss           FAISS over the model's `shortlist(u)`; ids are rows of u (`ann`)
    heads/<fingerprint>/      copy of the matcher's directory

`versions` keeps the promise: a reader never sees half an index, and keeps the version it opened.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from cvmatch import ann, engine, manifest, schema, shard, storage, versions
from cvmatch import config as configs
from cvmatch.engine import Pool
from cvmatch.images import PREPROCESS
from cvmatch.ingest import Ingest, ingest
from cvmatch.match.infer import EMBEDDING, Embed, EmbedQuery, V, embed_tiles
from cvmatch.match.model import JointFeatureLearningNet, Query
from cvmatch.match.score import joint_scores

EXHAUSTIVE = 100_000
"""Tiles up to which a search scores them all: 0.12 s a query on two cores (index.md, section 2)."""

_QUERIES = 16  # queries a step while recall is measured


@dataclass(frozen=True, kw_only=True)
class BuildIndex:
    """Embed tiles and publish them as the next version of an index."""

    tiles: Ingest = field(default_factory=lambda: Ingest(split="val"))
    """Data set whose tiles are the gallery."""
    splits: tuple[Literal["train", "val"], ...] = ()
    """Splits of it that the gallery takes; empty: only `tiles.split`."""
    rows: str = ""
    """URI of a directory of rows (as jobs/synthesize.py writes) to take instead of `tiles`."""
    model: str = "models/matcher"
    """Local directory of the matcher."""
    output: str = "data/index"
    """Local directory of the index; a new version joins those that are there."""
    pool: Pool = field(default_factory=lambda: Pool(batch=32))
    """Actors that embed tiles."""
    key: str = "auto"
    """FAISS factory key of the shortlist; "auto" chooses by the number of tiles (`ann.ladder`)."""
    probes: int = 64
    """Lists that a query visits, where the key has lists (IVF)."""
    shortlist: int = 0
    """Tiles that a two-stage search re-ranks exactly; 0 chooses by the number of tiles."""
    queries: str = ""
    """URI of synthesized rows on which the shortlist's recall is measured; empty: not measured."""
    sample: int = 200
    """Queries of it that are drawn."""
    max_rejected: float = 0.05
    """Largest share of rows without an embedding, in [0, 1]."""
    seed: int = 0
    """Of the draws of queries and of training vectors."""


@dataclass(frozen=True)
class Index:
    """A version of an index, opened for searching."""

    u: Float16[np.ndarray, "tile hidden"]
    """What is stored of each tile, memory-mapped."""
    tiles: pa.Table
    """row, pair_id, latitude and longitude (degrees or null) of each row of u, by pair_id."""
    ann: faiss.Index
    """Shortlist: ids are rows of u, scores are cosines."""
    matcher: JointFeatureLearningNet
    """The model that made u, in evaluation mode."""
    manifest: dict[str, Any]
    """What the version consists of, and what was measured."""
    heads: str
    """Local directory of the model."""

    def __len__(self) -> int:
        return len(self.u)

    @classmethod
    def open(cls, uri: str, model: str = "", version: str = "", deep: bool = False) -> "Index":
        """The current version of the index at `uri`, or the one named.

        `model`: a matcher directory that has to be the one that built it. `deep` hashes large files
        too, where only their sizes are checked else.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: remote, of another format, model or preprocessing, truncated or changed.
        """
        root = versions.local(uri)
        info = versions.read(root, version)
        _check_maker(uri, info, model)
        versions.check(root, info["files"], deep)
        folder = os.path.join(root, "shards", info["shards"][0]["sha"])
        u, tiles = shard.read(folder, rereads=info["rows"] <= EXHAUSTIVE)
        found = faiss.read_index(os.path.join(root, info["ann"]["file"]))
        if isinstance(found, faiss.IndexIVF):
            found.nprobe = info["ann"]["probes"]
        heads = os.path.join(root, "heads", info["model"])
        matcher = JointFeatureLearningNet.load(heads, engine.device())
        return cls(u, tiles, found, matcher, info, heads)

    def take(self, rows: Int64[np.ndarray, " row"] | slice) -> Float16[Tensor, "row hidden"]:
        """Copy of some rows of u on the model's device."""
        device = next(self.matcher.parameters()).device
        return torch.from_numpy(np.array(self.u[rows])).to(device)

    def scores(
        self, query: Query, dtype: torch.dtype = torch.float32
    ) -> Iterator[Float[Tensor, "query part"]]:
        """Scores of all tiles in the order of the rows, a part of the gallery at a time.

        Exact but for the rounding of u to half precision (3e-4), and of `dtype`.
        """
        for begin in range(0, len(self), shard.CHUNK):
            part = self.take(slice(begin, begin + shard.CHUNK))
            yield joint_scores(self.matcher, query, part, dtype)

    def nearest(self, query: Query, count: int = 0) -> Int64[np.ndarray, "query found"]:
        """Rows of the shortlist, best first, -1 where an IVF's lists held fewer.

        `count`: 0 takes the number that the index was built for.
        """
        vectors = query.embedding.detach().float().cpu().numpy()
        count = min(count or self.manifest["shortlist"], len(self))
        return self.ann.search(np.ascontiguousarray(vectors), count)[1]


def build(config: BuildIndex) -> dict[str, Any]:
    """Embed the tiles in a Ray pool and publish the index; gives its manifest.

    Raises:
        ValueError: see `publish`; or the pool does not fit the cluster.
    """
    root, model = versions.local(config.output), os.path.abspath(os.path.expanduser(config.model))
    # Named by what makes the rows, so that the same command takes an interrupted build up again.
    source = json.dumps([configs.plain(config.tiles), config.splits, config.rows, PREPROCESS])
    name = hashlib.sha256((manifest.fingerprint(model) + source).encode()).hexdigest()[:16]
    work = os.path.join(root, "building", name)
    engine.start()
    with engine.resumable(os.path.join(work, "checkpoint")):
        engine.preflight(config.pool)
        rows = embed_tiles(_tiles(config), Embed(model=model, pool=config.pool))
        rows.write_parquet(os.path.join(work, "parts"))
    info = publish(os.path.join(work, "parts"), replace(config, model=model))
    storage.remove(work)
    return info


def publish(parts: str, config: BuildIndex) -> dict[str, Any]:
    """Make the rows of Parquet files (pair_id, u, latitude, longitude, error) the current version.

    Raises:
        ValueError: no good row, a pair_id twice, u of another width or not finite in half
            precision, or more than `max_rejected` of the rows failed.
    """
    root = versions.local(config.output)
    tiles, rejected = shard.accepted(parts, config.max_rejected)
    os.makedirs(root, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".aside-", dir=root) as aside:
        heads = shutil.copytree(os.path.expanduser(config.model), os.path.join(aside, "heads"))
        maker = manifest.fingerprint(heads)
        files = versions.place(root, heads, f"heads/{maker}")
        heads = os.path.join(root, "heads", maker)
        matcher = JointFeatureLearningNet.load(heads, engine.device())
        folder = os.path.join(aside, "shard")
        name = shard.write(folder, parts, tiles, matcher.config.hidden, maker)
        files |= versions.place(root, folder, f"shards/{name}")
        u, tiles = shard.read(os.path.join(root, "shards", name), rereads=True)
        info = _about(config, len(u), matcher) | {"model": maker, "rejected": len(rejected)}
        index = Index(
            u, tiles, _shortlist(u, matcher, info["ann"]["key"], config.seed), matcher, info, heads
        )
        info["ann"]["file"], more = _place_ann(root, aside, index.ann)
        info["shards"] = [{"sha": name, "rows": len(u), "row_start": 0}]
        info["recall"] = recall(index, _sampled(config)) if config.queries else None
        info["files"] = files | more
        lines = "".join(json.dumps(row) + "\n" for row in rejected)
        return versions.commit(root, info, {"rejected.jsonl": lines.encode()})


@torch.inference_mode()
def recall(index: Index, query: Query) -> dict[str, float]:
    """Share, in [0, 1], of the exact model's best 1 and best 10 tiles that the shortlist holds."""
    best = min(10, len(index))
    found = torch.zeros(len(query.v), best, dtype=torch.bool)
    for begin in range(0, len(found), _QUERIES):
        part = Query(*(value[begin : begin + _QUERIES] for value in query))
        exact = torch.cat(list(index.scores(part)), dim=1).topk(best).indices.cpu().numpy()
        for at, (rows, kept) in enumerate(zip(exact, index.nearest(part), strict=True), begin):
            found[at] = torch.from_numpy(np.isin(rows, kept))
    top = {"top1": found[:, 0].double().mean().item(), "top10": found.double().mean().item()}
    return top | {"shortlist": index.manifest["shortlist"], "queries": len(found)}


def _tiles(config: BuildIndex) -> ray.data.Dataset:
    wanted = [schema.PAIR_ID, schema.AERIAL, schema.LATITUDE, schema.LONGITUDE, schema.ERROR]
    if config.rows:
        manifest.read(config.rows)
        filesystem, path = storage.resolve(config.rows)
        return ray.data.read_parquet(path, filesystem=filesystem, columns=wanted)
    splits = config.splits or (config.tiles.split,)
    first, *rest = [ingest(replace(config.tiles, split=split)) for split in splits]
    return (first.union(*rest) if rest else first).select_columns(wanted)


def _about(config: BuildIndex, rows: int, matcher: JointFeatureLearningNet) -> dict[str, Any]:
    key = ann.ladder(rows, matcher.config.hidden) if config.key == "auto" else config.key
    return {
        "rows": rows,
        "hidden": matcher.config.hidden,
        "preprocess": PREPROCESS,
        "config": configs.plain(config),
        "ann": {"key": key, "probes": config.probes},
        "shortlist": min(rows, config.shortlist or ann.candidates(rows)),
    }


def _shortlist(
    u: Float16[np.ndarray, "tile hidden"],
    matcher: JointFeatureLearningNet,
    key: str,
    seed: int,
) -> faiss.Index:
    """FAISS over the tiles' own embeddings, which are functions of u alone."""
    device = engine.device()

    @torch.inference_mode()
    def vectors(rows: np.ndarray) -> np.ndarray:
        return matcher.shortlist(torch.from_numpy(u[rows]).to(device)).float().cpu().numpy()

    return ann.build(key, vectors, len(u), seed)


def _place_ann(root: str, aside: str, index: faiss.Index) -> tuple[str, versions.Files]:
    path = os.path.join(aside, "ann.faiss")
    faiss.write_index(index, path)
    (entry,) = versions.files_of(path, "ann").values()
    name = f"ann/{entry['sha256'][:16]}.faiss"
    return name, versions.place(root, path, name)


def _sampled(config: BuildIndex) -> Query:
    """Some of the queries, embedded in this process, of the fullest level that the model knows."""
    alone = JointFeatureLearningNet.config_of(config.model).alone
    more = () if alone else (schema.SYNTHETIC, schema.SYNTHETIC_CLASSES)
    pictures = (schema.GROUND, *more)
    columns = [schema.PAIR_ID, *pictures, schema.ERROR]
    ids = [
        pair_id
        for table in shard.batches(config.queries, [schema.PAIR_ID, schema.ERROR], shard.CHUNK)
        for pair_id in table.filter(pc.field(schema.ERROR).is_null())[schema.PAIR_ID].to_pylist()
    ]
    count = min(config.sample, len(ids))
    drawn = np.random.default_rng(config.seed).choice(ids, count, replace=False).tolist()
    embed = EmbedQuery(config.model, "G" if alone else "G+A+S")
    parts = []
    for table in shard.batches(config.queries, columns):
        rows = table.filter(pc.field(schema.PAIR_ID).isin(drawn))
        parts.append(embed({name: rows[name].to_numpy() for name in columns}))
    good = np.concatenate([part[schema.ERROR] == None for part in parts])  # noqa: E711
    if not good.any():
        raise ValueError(
            f"build_index: expected {list(pictures)} in some rows of {config.queries}, got none. "
            "Run jobs/synthesize.py on them, or leave --queries out."
        )
    embedding, v = (np.concatenate([part[name] for part in parts])[good] for name in (EMBEDDING, V))
    device = engine.device()
    return Query(torch.from_numpy(embedding).to(device), torch.from_numpy(v).to(device))


def _check_maker(uri: str, info: dict[str, Any], model: str) -> None:
    if info["preprocess"] != PREPROCESS:
        raise ValueError(
            f"index {uri}: expected preprocessing {info['preprocess']}, but this version of "
            f"cvmatch has {PREPROCESS}. Build it again: jobs/build_index.py --output {uri}"
        )
    if model and (got := manifest.fingerprint(model)) != info["model"]:
        raise ValueError(
            f"index {uri}: expected matcher {info['model']}, got {got} (of {model}). Search with "
            "the model that built it (leave --model out), or build the index again: "
            f"jobs/build_index.py --model {model} --output {uri}"
        )
