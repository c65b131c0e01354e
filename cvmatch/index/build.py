"""Tiles -> the next version of an index: their vectors, shards, the shortlist, its recall."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cvmatch import config as configs
from cvmatch.data import manifest, schema, storage, tables
from cvmatch.data.tables import Reject
from cvmatch.index import shard, verify, versions
from cvmatch.index.embedding import (
    QuerySample,
    building_directory,
    embed_gallery,
    find_left_out,
    fingerprint_gallery,
    ray_map,
    read_gallery,
    sample_queries,
)
from cvmatch.index.manifest import AnnInfo, IndexManifest, Recall, TileOrigin
from cvmatch.index.reader import Index, TopTiles, open_version, rank
from cvmatch.index.settings import BuildIndex
from cvmatch.index.shortlist import default_factory_key, default_shortlist_size
from cvmatch.index.writer import (
    IndexWriter,
    TaskMapper,
    open_writer,
    serial_map,
)
from cvmatch.match.model import fingerprint_parts, read_config
from cvmatch.nn import calibration
from cvmatch.nn.calibration import Calibration
from cvmatch.runtime import session, tracking
from cvmatch.runtime.gauges import set_gauge

SHARD_ROWS = 100_000
"""Tiles of a shard, the unit of parallel work."""

MIN_SHORTLIST, MAX_SHORTLIST = 16, 16_384
"""Tiles at least and at most that are re-ranked where queries measure it."""

_STEP = 16  # queries that are ranked at a time

_log = logging.getLogger(__name__)


def build(config: BuildIndex, shard_rows: int = SHARD_ROWS) -> IndexManifest:
    """Embed the tiles in a Ray pool and publish the index; return its manifest.

    The same command goes on where a killed one stopped, and ends in the same files. Tiles that an
    earlier version holds, embedded by the same tower, are not embedded again. Where the current
    version is what is asked for, and whole, it stays, and none is published.

    Raises:
        DryRun: that is all that is asked for.
        ValueError: see `publish`; or the pool does not fit the cluster.
    """
    session.start()
    config = replace(config, model=storage.absolute(config.model))
    origin = _tile_origin(config, shard_rows)
    root = versions.fetch(config.output)
    known = _find_version(root, origin)
    if known and _is_whole(root, known, config):
        _log.info("version %s is this index already: nothing to do", known.version)
        return known
    if config.dry_run:
        embed_gallery(config, config.model, dataclasses.asdict(origin))
    with tracking.start("index", config) as run:
        tasks, built = ray_map(config.output), ""
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
                left_out=find_left_out(config),
            )
            built = building_directory(config.output, inputs)
        published = _push(config, tasks, origin, published)
        if built:
            storage.remove(built)
        run.metrics(_numbers(published))
        if published.recall:
            set_gauge("cvmatch_shortlist_recall", published.recall.top1, index=config.output)
        run.text(published.to_json(), "manifest.json")
    return published


def _push(
    config: BuildIndex, tasks: TaskMapper, origin: TileOrigin, made: IndexManifest
) -> IndexManifest:
    """Push a version; where another was published meanwhile, it follows that one."""
    while True:
        try:
            versions.push(config.output, made.version)
        except versions.StaleVersionError:
            versions.fetch(config.output)
            made = publish("", config, tasks, origin=origin, known=made)
        else:
            return made


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
    left_out: Sequence[Reject] = (),
) -> IndexManifest:
    """Make embedded tiles the current version; return its manifest.

    Args:
        parts: directory of Parquet files (pair_id, tile_vector, latitude, longitude, error).
        config: settings of the build.
        run: does the work on shards.
        shard_rows: tiles of a shard.
        origin: what the shards depend on; it gives the tiles of a shard.
        known: manifest of a version whose shards are taken instead of `parts`.
        check_samples: tiles whose pictures are stored, to verify the index.
        embed_seconds: what embedding took.
        left_out: rows that were not embedded, which count as failed.

    Raises:
        ValueError: no good row, a pair_id twice, tile_vector of another width or not finite in half
            precision, or more than `max_rejected` of the rows failed.
    """
    root = versions.local_root(config.output)
    shard_rows = origin.shard_rows if origin else shard_rows
    tiles, rejected = shard.TILES.empty_table(), []
    if not known:
        tiles, rejected = shard.select_good_rows(parts, config.max_rejected, left_out)
    with open_writer(root, run) as writer:
        writer.seconds["embed"] = embed_seconds
        model = writer.copy_matcher(config.model)
        shape, model_parts = read_config(config.model), fingerprint_parts(config.model)
        if known:
            shards = tuple(replace(info, codes="") for info in known.shards)
            writer.files |= known.select_files("shards", "check_samples")
            identical_tiles, identical = known.identical_tiles, known.identical
        else:
            shards = writer.write_shards(parts, tiles, shape.width, model_parts["tile"], shard_rows)
            identical_tiles, identical = writer.find_identical(shards, tiles[schema.PAIR_ID])
        rows = sum(info.rows for info in shards)
        auto_key = default_factory_key(rows, shape.shortlist_width)
        key = auto_key if config.key == "auto" else config.key
        info = IndexManifest(
            rows=rows,
            width=shape.width,
            preprocess=shape.preprocess,
            model=model,
            model_parts=model_parts,
            config=configs.plain(config),
            shard_rows=shard_rows,
            shards=shards,
            ann=AnnInfo(key, config.nprobe),
            shortlist=default_shortlist_size(rows),
            tile_origin=origin,
            request=_request(config),
            rejected=known.rejected if known else 0,
            identical_tiles=identical_tiles,
            identical=identical,
        )
        queries = sample_queries(config.queries, config.model, config.seed)
        info = _add_shortlist(writer, config, info, shape.shortlist_width, queries)
        stored = known.check_samples if known else verify.store_check_samples(writer, check_samples)
        return writer.publish(replace(info, check_samples=stored), rejected)


def measure_version(
    writer: IndexWriter, info: IndexManifest, queries: QuerySample | None
) -> IndexManifest:
    """Measure a version that is not published yet; without queries, return it as it is."""
    if not queries:
        return info
    with writer.time_stage("recall"):
        index = open_version(writer.root, info)
        exact = _rank_exactly(index, queries.vectors)
        places = _find_places(index, queries.vectors, exact, info.shortlist)
        info = replace(info, recall=_recall_of(places, info.shortlist))
        return _add_calibrations(info, index, queries, exact)


def _add_calibrations(
    info: IndexManifest, index: Index, queries: QuerySample, exact: TopTiles
) -> IndexManifest:
    """Fit probabilities on the queries whose tiles the index holds, by their modality.

    `exact`: the best tiles of the fullest queries.
    """
    names = pc.SetLookupOptions(value_set=index.tiles[schema.PAIR_ID].combine_chunks())
    rows = pc.call_function("index_in", [pa.array(queries.ids, pa.string())], names)
    own = rows.fill_null(-1).to_numpy().astype(np.int64)
    own[np.isin(own, index.deleted)] = -1
    here = np.flatnonzero(own >= 0)
    found: dict[str, Calibration] = {}
    for modality, vectors in queries.modalities.items():
        best = exact if vectors is queries.vectors else _rank_exactly(index, vectors)
        own_place = best.rows[here] == own[here, None]
        places = np.where(own_place.any(1), own_place.argmax(1), best.rows.shape[1])
        answers = calibration.Answers(best.scores[here].astype(np.float64), places)
        if fitted := calibration.calibrate(answers):
            found[modality] = fitted
    return replace(info, calibrations=found, queries=queries.origin)


def compute_recall(index: Index, query: Float[Tensor, "query width"]) -> Recall:
    """Compute the share of the exact best 1 and best 10 tiles that the shortlist holds."""
    size = index.manifest.shortlist
    return _recall_of(_find_places(index, query, _rank_exactly(index, query), size), size)


def _recall_of(places: Int64[np.ndarray, "query best"], size: int) -> Recall:
    held = places < size
    return Recall(
        top1=held[:, 0].mean().item(),
        top10=held.mean().item(),
        shortlist=size,
        queries=len(held),
    )


def _choose_size(places: Int64[np.ndarray, "query best"], most: int, recall: float) -> int:
    """Return the fewest tiles, a power of two, that hold the share `recall` of the exact best.

    They hold the share of 1 - 2 (1 - recall) of the exact ten, too.
    """
    needed = max(
        np.quantile(places[:, 0], recall, method="higher"),
        np.quantile(places, max(0.0, 2 * recall - 1), method="higher"),
    )
    return min(most, max(MIN_SHORTLIST, 2 ** math.ceil(math.log2(needed + 1))))


def _rank_exactly(index: Index, query: Float[Tensor, "query width"]) -> TopTiles:
    """Rank the tiles that take part in a probability; of a large index, that takes longest."""
    steps = [rank(index, step, calibration.TOP, "exact") for step in query.split(_STEP)]
    return TopTiles(*(np.concatenate(parts) for parts in zip(*steps, strict=True)))


@torch.inference_mode()
def _find_places(
    index: Index, query: Float[Tensor, "query width"], exact: TopTiles, count: int
) -> Int64[np.ndarray, "query best"]:
    """Return where the shortlist of `count` tiles has each query's exact ten; `count`: nowhere."""
    best = min(10, len(index) - len(index.deleted))
    places = np.full((len(query), best), count)
    for begin in range(0, len(query), _STEP):
        near = index.find_nearest(query[begin : begin + _STEP], count)
        own = exact.rows[begin : begin + _STEP, :best]
        for number, (rows, shortlist) in enumerate(zip(own, near, strict=True), begin):
            found, where = np.nonzero(rows[:, None] == shortlist[None])
            places[number, found] = where
    return places


def _add_shortlist(
    writer: IndexWriter,
    config: BuildIndex,
    info: IndexManifest,
    width: int,
    queries: QuerySample | None,
) -> IndexManifest:
    """Make the codes, and choose how many of the tiles that they find are re-ranked."""
    name = writer.train_shortlist(
        info.ann.key, writer.open_vectors(info.shards), width, config.seed
    )
    shards = writer.encode_shards(info.shards, name)
    ann = replace(info.ann, parts=(writer.merge_shards(shards, name),))
    info = replace(info, shortlist_dir=name, shards=shards, ann=ann)
    if not queries:
        return info
    with writer.time_stage("recall"):
        index = open_version(writer.root, info)
        most = min(len(index), MAX_SHORTLIST)
        exact = _rank_exactly(index, queries.vectors)  # once: it is the dear search
        places = _find_places(index, queries.vectors, exact, most)
        recall = _recall_of(places, _choose_size(places, most, config.recall))
        info = replace(info, shortlist=recall.shortlist, recall=recall)
        return _add_calibrations(info, index, queries, exact)


def _tile_origin(config: BuildIndex, shard_rows: int) -> TileOrigin:
    return TileOrigin(
        tower=fingerprint_parts(config.model)["tile"],
        preprocess=read_config(config.model).preprocess,
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
