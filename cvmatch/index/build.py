"""Tiles -> the next version of an index: their projections, shards, the shortlist, its recall."""

import contextlib
import dataclasses
import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cvmatch import config as configs
from cvmatch.data import manifest, storage, tables
from cvmatch.data.images import PREPROCESS
from cvmatch.index import shard, verify, versions
from cvmatch.index.embedding import (
    QuerySplit,
    building_directory,
    embed_gallery,
    fingerprint_gallery,
    ray_map,
    read_gallery,
    split_queries,
)
from cvmatch.index.manifest import AnnInfo, Files, HeadKind, IndexManifest, Recall, TileOrigin
from cvmatch.index.reader import MAX_EXACT_TILES, Index, open_version, rank
from cvmatch.index.settings import BuildIndex
from cvmatch.index.shortlist import (
    MatcherHead,
    ShortlistHead,
    default_factory_key,
    default_shortlist_size,
    distil,
)
from cvmatch.index.writer import (
    IndexWriter,
    TaskMapper,
    load_matcher,
    open_writer,
    sample_rows,
    serial_map,
)
from cvmatch.match.fusion import Fusion, Query
from cvmatch.match.model import fingerprint_parts
from cvmatch.runtime import session, tracking

SHARD_ROWS = 100_000
"""Tiles of a shard, the unit of parallel work."""

RECALL_TARGET = {"top1": 0.99, "top10": 0.98}
"""Shares of the exact best tiles that a shortlist should hold."""

_SAMPLE = 65_536  # tiles from which a distilled head learns: 32 MiB of projections

_STEP = 16  # queries that are ranked at a time

_log = logging.getLogger(__name__)


def build(config: BuildIndex, shard_rows: int = SHARD_ROWS) -> IndexManifest:
    """Embed the tiles in a Ray pool and publish the index; return its manifest.

    The same command goes on where a killed one stopped, and ends in the same files. Tiles that an
    earlier version holds, embedded by the same tower, are not embedded again. Where the current
    version is what is asked for, and whole, it stays, and none is published.

    Raises:
        ValueError: see `publish`; or the pool does not fit the cluster.
    """
    session.start()
    config = replace(config, model=os.path.abspath(os.path.expanduser(config.model)))
    origin = _tile_origin(config, shard_rows)
    root = versions.fetch(config.output)
    known = _find_version(root, origin)
    if known and _is_whole(root, known, config):
        _log.info("version %s is this index already: nothing to do", known.version)
        versions.push(config.output, known.version)  # that of a killed build may lack files there
        return known
    with tracking.start("index", config) as run:
        tasks = ray_map(config.output)
        if known:
            _log.info("tiles are those of version %s: not embedded again", known.version)
            published = publish("", config, tasks, origin=origin, known=known)
        else:
            inputs = dataclasses.asdict(origin)
            parts, seconds = embed_gallery(config, config.model, inputs)
            samples = read_gallery(config).take(verify.CHECK_SAMPLES)
            published = publish(
                parts,
                config,
                tasks,
                origin=origin,
                check_samples=verify.select_check_samples(pa.Table.from_pylist(samples)),
                embed_seconds=seconds,
            )
            storage.remove(building_directory(config.output, inputs))
        versions.push(config.output, published.version)
        run.metrics(_numbers(published))
        run.text(published.to_json(), "manifest.json")
    return published


def publish(
    parts: str,
    config: BuildIndex,
    run: TaskMapper = serial_map,
    *,
    shard_rows: int = SHARD_ROWS,
    origin: TileOrigin | None = None,
    known: IndexManifest | None = None,
    check_samples: pa.Table | None = None,
    embed_seconds: float = 0.0,
) -> IndexManifest:
    """Make embedded tiles the current version; return its manifest.

    Args:
        parts: directory of Parquet files (pair_id, tile_proj, latitude, longitude, error).
        config: settings of the build.
        run: does the work on shards.
        shard_rows: tiles of a shard.
        origin: what the shards depend on; it gives the tiles of a shard.
        known: manifest of a version whose shards are taken instead of `parts`.
        check_samples: tiles whose pictures are stored, to verify the index.
        embed_seconds: what embedding took.

    Raises:
        ValueError: no good row, a pair_id twice, tile_proj of another width or not finite in half
            precision, or more than `max_rejected` of the rows failed.
    """
    root = versions.local_root(config.output)
    shard_rows = origin.shard_rows if origin else shard_rows
    tiles, rejected = (None, []) if known else shard.select_good_rows(parts, config.max_rejected)
    with open_writer(root, run) as writer:
        writer.seconds["embed"] = embed_seconds
        model = writer.copy_matcher(config.model)
        matcher, model_parts = load_matcher(root, model), fingerprint_parts(config.model)
        if known:
            shards = tuple(replace(info, codes="") for info in known.shards)
            writer.files |= known.select_files("shards", "check_samples")
        else:
            shards = writer.write_shards(
                parts, tiles, matcher.hidden, model_parts["tile"], shard_rows
            )
        rows = sum(info.rows for info in shards)
        auto_key = default_factory_key(rows, matcher.hidden)
        key = auto_key if config.key == "auto" else config.key
        info = IndexManifest(
            rows=rows,
            hidden=matcher.hidden,
            preprocess=PREPROCESS,
            model=model,
            model_parts=model_parts,
            config=configs.plain(config),
            shard_rows=shard_rows,
            shards=shards,
            ann=AnnInfo(key, config.nprobe),
            shortlist=min(rows, config.shortlist or default_shortlist_size(rows)),
            tile_origin=origin,
            request=_request(config),
            rejected=known.rejected if known else 0,
        )
        queries = split_queries(config.queries, config.model, config.seed)
        info = _add_shortlist(writer, config, info, matcher, queries)
        if queries:
            info = replace(info, queries=queries.origin)
        stored = known.check_samples if known else verify.store_check_samples(writer, check_samples)
        return writer.publish(replace(info, check_samples=stored), rejected)


def measure_recall(
    writer: IndexWriter, info: IndexManifest, queries: QuerySplit | None
) -> Recall | None:
    """Measure a version that is not published yet; None without queries."""
    if not queries:
        return None
    with writer.time_stage("recall"):
        return compute_recall(open_version(writer.root, info), queries.measure)


@torch.inference_mode()
def compute_recall(index: Index, query: Query) -> Recall:
    """Compute the share of the exact model's best 1 and best 10 tiles that the shortlist holds."""
    best = min(10, len(index) - len(index.deleted))
    held = torch.zeros(len(query.query_proj), best, dtype=torch.bool)
    for begin in range(0, len(held), _STEP):
        step = query.rows(slice(begin, begin + _STEP))
        exact = rank(index, step, best, "exact").rows
        pairs = zip(exact, index.find_nearest(step), strict=True)
        for number, (rows, shortlist) in enumerate(pairs, begin):
            held[number] = torch.from_numpy(np.isin(rows, shortlist))
    return Recall(
        top1=held[:, 0].double().mean().item(),
        top10=held.double().mean().item(),
        shortlist=index.manifest.shortlist,
        queries=len(held),
    )


@dataclass(frozen=True)
class _Candidate:
    """A shortlist that was tried."""

    info: IndexManifest
    files: Files
    seconds: dict[str, float]


def _add_shortlist(
    writer: IndexWriter,
    config: BuildIndex,
    info: IndexManifest,
    matcher: Fusion,
    queries: QuerySplit | None,
) -> IndexManifest:
    """Make the shortlist: of the heads that are tried, the one that holds the most.

    The matcher's own comes first. A distilled one follows where exact search is too slow, there
    are queries to learn from, and the first holds too little.
    """
    tile_proj, files, seconds = writer.open_projections(info.shards), writer.files, writer.seconds
    kinds: list[HeadKind] = ["matcher"]
    if queries and info.rows > MAX_EXACT_TILES:
        kinds.append("distilled")
    tried: list[_Candidate] = []
    for kind in kinds:
        writer.files, writer.seconds = dict(files), dict(seconds)
        head = _make_head(writer, kind, config, tile_proj, matcher, queries)
        name = writer.train_shortlist(head, info.ann.key, tile_proj, config.seed)
        shards = writer.encode_shards(info.shards, name, info.model)
        ann = replace(info.ann, parts=(writer.merge_shards(shards, name),))
        candidate = replace(info, head=kind, shortlist_dir=name, shards=shards, ann=ann)
        recall = measure_recall(writer, candidate, queries)
        tried.append(_Candidate(replace(candidate, recall=recall), writer.files, writer.seconds))
        if recall:
            held = 100 * recall.top1, 100 * recall.top10
            _log.info("%s head: holds %.1f %% of the exact first, %.1f %% of the ten", kind, *held)
        if recall and all(getattr(recall, top) >= share for top, share in RECALL_TARGET.items()):
            break
    best = max(tried, key=lambda candidate: _sum_recall(candidate.info.recall))
    writer.files, writer.seconds = best.files, best.seconds
    if others := [one for one in tried if one is not best]:
        spent = sum(sum(one.seconds.values()) - sum(seconds.values()) for one in others)
        writer.seconds["discarded"] = spent
    return best.info


def _sum_recall(recall: Recall | None) -> float:
    return recall.top1 + recall.top10 if recall else 0.0


def _make_head(
    writer: IndexWriter,
    kind: HeadKind,
    config: BuildIndex,
    tile_proj: shard.ShardedArray,
    matcher: Fusion,
    queries: QuerySplit | None,
) -> ShortlistHead:
    if kind == "matcher":
        return MatcherHead(matcher)
    assert queries, "a distilled head learns from queries"
    with writer.time_stage("head"):
        sample = tile_proj.take(sample_rows(len(tile_proj), _SAMPLE, config.seed))
        return distil(matcher, queries.distil, sample, config.seed)


def _tile_origin(config: BuildIndex, shard_rows: int) -> TileOrigin:
    return TileOrigin(
        tower=fingerprint_parts(config.model)["tile"],
        preprocess=PREPROCESS,
        shard_rows=shard_rows,
        batch=config.pool.batch,
        tiles=fingerprint_gallery(config),
    )


def _request(config: BuildIndex) -> str:
    """Hash all that a build depends on but for its tiles: settings, matcher, queries."""
    queries = tables.sizes(config.queries) if config.queries else []
    return manifest.digest([configs.plain(config), fingerprint_parts(config.model), queries])


def _is_whole(root: str, info: IndexManifest, config: BuildIndex) -> bool:
    """Return whether a version with the right shards is current, as asked for and undamaged."""
    if info.version != versions.current_version(root) or info.request != _request(config):
        return False
    with contextlib.suppress(FileNotFoundError, ValueError):
        versions.check_files(root, info.files, deep=True)
        return True
    return False


def _find_version(root: str, origin: TileOrigin) -> IndexManifest | None:
    """Find the newest version of just these shards, if its files are whole."""
    for name in reversed(versions.list_versions(root)):
        # One of another format, or damaged, is no help, but must not be in the way either.
        with contextlib.suppress(FileNotFoundError, ValueError):
            info = versions.read_version(root, name)
            if info.tile_origin == origin:
                versions.check_files(root, info.select_files("shards"), deep=True)
                return info
    return None


def _numbers(info: IndexManifest) -> dict[str, float]:
    """Flatten what was measured, for the run's log."""
    numbers = {"rows": float(info.rows), "rejected": float(info.rejected)}
    plain: Any = info.plain()
    for name in ("recall", "seconds", "tiles_per_s", "bytes_per_tile"):
        numbers |= {f"{name}/{key}": float(value) for key, value in (plain[name] or {}).items()}
    return numbers
