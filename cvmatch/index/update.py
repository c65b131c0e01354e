"""Tiles join an index, leave it, and its pieces become one again; each makes a new version."""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from cvmatch.data import schema, storage
from cvmatch.data.tables import Reject
from cvmatch.index import embedding, shard, verify, versions
from cvmatch.index.build import SHARD_ROWS, measure_version
from cvmatch.index.manifest import AnnPartInfo, Files, IndexManifest, ShardInfo
from cvmatch.index.reader import Index
from cvmatch.index.settings import AddTiles, Compact, DeleteTiles, GalleryConfig, Vacuum
from cvmatch.index.shard import ShardedArray
from cvmatch.index.shortlist import default_shortlist_size
from cvmatch.index.writer import (
    NAMED_GROUPS,
    STAGING,
    IndexWriter,
    TaskMapper,
    open_writer,
    serial_map,
    store_shard,
)
from cvmatch.runtime import session

_log = logging.getLogger(__name__)

_ROW = "row"
_DAY_S = 86_400.0

MAX_ANN_PARTS = 16
"""Parts of the shortlist at most: each is searched by itself."""


@dataclass(frozen=True)
class DeleteResult:
    """A deletion."""

    manifest: IndexManifest
    missing: int
    """Ids that were not there."""


@dataclass(frozen=True)
class VacuumResult:
    """What was removed."""

    versions: int
    files: int
    bytes: int


def add(config: AddTiles) -> IndexManifest:
    """Embed the tiles in a Ray pool and add them; return the new manifest.

    Raises:
        ValueError: see `join`.
    """
    session.start()
    root = versions.fetch(config.output)
    info = versions.read_version(root)
    # Of no version: an addition that was refused goes on to another one with what it embedded.
    tiles = embedding.fingerprint_gallery(config)
    inputs: dict[str, object] = {"job": "add", "tower": info.tower, "tiles": tiles}
    model = versions.locate_matcher(config.output, info.model)
    parts, seconds = embedding.embed_gallery(config, model, inputs)
    left_out = embedding.find_left_out(config)
    new = _join_current(parts, config, seconds, info.tower, left_out)
    storage.remove(embedding.building_directory(config.output, inputs))
    return new


@versions.retry_stale
def _join_current(
    parts: str, config: AddTiles, embed_seconds: float, tower: str, left_out: Sequence[Reject]
) -> IndexManifest:
    versions.fetch(config.output)
    tasks = embedding.ray_map(config.output)
    new = join(parts, config, tasks, embed_seconds=embed_seconds, tower=tower, left_out=left_out)
    versions.push(config.output, new.version)
    return new


def join(
    parts: str,
    config: GalleryConfig,
    run: TaskMapper = serial_map,
    *,
    shard_rows: int = SHARD_ROWS,
    embed_seconds: float = 0.0,
    tower: str = "",
    left_out: Sequence[Reject] = (),
) -> IndexManifest:
    """Add embedded tiles (see `build.publish`) to the current version; return the new manifest.

    A shard of just those tiles that were deleted is there still: its rows live again.

    Args:
        parts: directory of Parquet files.
        config: the index and what measures it.
        run: does the work on shards.
        shard_rows: tiles of a shard.
        embed_seconds: what embedding took.
        tower: fingerprint of what embedded the rows, which has to be the version's; empty: it is.
        left_out: rows that were not embedded, which count as failed.

    Raises:
        ValueError: an id is there already, or another tower; as `build.publish`; or see
            `versions.commit`.
    """
    root = versions.local_root(config.output)
    index = Index.open(root)
    info = index.manifest
    if tower and tower != info.tower:
        raise ValueError(
            f"index {root}: the tiles were embedded by the tower {tower}, but {info.version} was "
            f"built meanwhile with {info.tower}. Nothing was added. Run it again."
        )
    tiles, rejected = shard.select_good_rows(parts, config.max_rejected, left_out)
    both = tiles.filter(pc.field(schema.PAIR_ID).isin(index.live_ids))[schema.PAIR_ID]
    if len(both):
        raise ValueError(
            f"index {root}: {len(both)} of {len(tiles)} tiles are there already, such as "
            f"{both.slice(0, 3).to_pylist()}. Delete them first (cvmatch index delete), or leave "
            "them out."
        )
    with open_writer(root, run) as writer:
        writer.seconds["embed"] = embed_seconds
        writer.files |= _shared_files(info)
        written = writer.write_shards(parts, tiles, info.width, info.tower, shard_rows)
        identical_tiles, identical = writer.find_identical(written, tiles[schema.PAIR_ID])
        added, revived = _separate_revived(writer, written, info)
        added = writer.encode_shards(added, info.shortlist_dir)
        shards, ann_parts = (*info.shards, *added), info.ann.parts
        if added and len(ann_parts) < MAX_ANN_PARTS:
            ann_parts = (*ann_parts, writer.merge_shards(added, info.shortlist_dir))
        elif added:
            writer.files = {n: f for n, f in writer.files.items() if not n.startswith("ann/")}
            ann_parts = (writer.merge_shards(shards, info.shortlist_dir),)
        new = _derive_manifest(info, shards, ann_parts)
        if added:
            groups = sorted((*info.identical, *identical), key=lambda one: -one.tiles)
            total = info.identical_tiles + identical_tiles
            new = replace(new, identical_tiles=total, identical=tuple(groups[:NAMED_GROUPS]))
        if len(revived):
            deleted = _store_deleted(writer, np.setdiff1d(index.deleted, revived))
            new = replace(new, deleted=deleted)
        queries = embedding.sample_queries(config.queries, index.matcher_dir, config.seed)
        return writer.publish(measure_version(writer, new, queries), rejected)


@versions.retry_stale
def delete(config: DeleteTiles) -> DeleteResult:
    """Delete tiles.

    Raises:
        ValueError: none of the ids is there; these are all tiles; or see `versions.commit`.
    """
    root = versions.fetch(config.output)
    index = Index.open(root)
    lines = storage.read_text(config.file).splitlines() if config.file else ()
    ids = {*config.ids, *(line.strip() for line in lines if line.strip())}
    live = _live_table(index)
    known = live.filter(pc.field(schema.PAIR_ID).isin(pa.array(sorted(ids), pa.string())))
    missing = sorted(ids - set(known[schema.PAIR_ID].to_pylist()))
    if not len(known):
        raise ValueError(
            f"index {root}: expected ids of tiles that are there (--ids or --file), got "
            f"{len(ids)}, of which none is, such as {missing[:3]}. Nothing was deleted."
        )
    if missing:
        _log.warning(
            "%d of %d ids are not in the index, such as %s: the other %d are deleted",
            len(missing), len(ids), missing[:3], len(known),
        )  # fmt: skip
    deleted = np.union1d(index.deleted, known[_ROW].to_numpy())
    if len(deleted) == len(index):
        raise ValueError(f"index {root}: these are all its tiles. Remove the directory instead.")
    with open_writer(root) as writer:
        info = index.manifest
        writer.files |= _shared_files(info)
        new = _derive_manifest(info, info.shards, info.ann.parts)
        new = writer.publish(replace(new, deleted=_store_deleted(writer, deleted)), [])
    versions.push(config.output, new.version)
    return DeleteResult(new, len(missing))


@versions.retry_stale
def compact(config: Compact, run: TaskMapper = serial_map) -> IndexManifest:
    """Write the live tiles as new shards by pair_id, with the same codebooks; return the manifest.

    Where they are so already, it is that of the current version, and none is published.

    Raises:
        ValueError: see `versions.commit`.
    """
    root = versions.fetch(config.output)
    index = Index.open(root)
    info = index.manifest
    rows = _live_table(index).sort_by(schema.PAIR_ID)[_ROW].to_numpy()
    size = info.shard_rows
    if _is_compact(index, rows, size):
        _log.info("version %s is compact already: nothing to do", info.version)
        return info
    shas = tuple(part.sha for part in info.shards)
    starts = range(0, len(rows), size)
    tasks = [
        _RewriteTask(root, shas, chunk, index.tiles.take(chunk), info.tower)
        for chunk in (rows[start : start + size] for start in starts)
    ]
    with open_writer(root, run) as writer:
        writer.files |= info.select_files("matcher", "shortlist")
        with writer.time_stage("shards"):
            shards = writer.number_shards(run(_rewrite, tasks))
        shards = writer.encode_shards(shards, info.shortlist_dir)
        part = writer.merge_shards(shards, info.shortlist_dir)
        samples = verify.store_check_samples(writer, verify.live_check_samples(root, index))
        new = _derive_manifest(info, shards, (part,))
        new = writer.publish(replace(new, deleted=None, check_samples=samples), [])
    versions.push(config.output, new.version)
    return new


def vacuum(config: Vacuum) -> VacuumResult:
    """Remove old versions of a local index, and files that no other one needs.

    Raises:
        ValueError: an index in an object store.
    """
    if storage.is_remote(config.output):
        raise ValueError(f"vacuum: expected a local index, got {config.output}.")
    root = versions.local_root(config.output)
    with versions.publish_lock(root):
        return _vacuum(root, config.keep)


def _vacuum(root: str, keep: int) -> VacuumResult:
    names = versions.list_versions(root)
    current = versions.read_version(root).version
    old = [name for name in names if name != current]
    old = old[: max(0, len(names) - keep)]
    stay = [versions.read_version(root, name) for name in names if name not in old]
    needed = {file for info in stay for file in info.files}
    for name in old:
        shutil.rmtree(os.path.join(root, "versions", name))
    for name in os.listdir(root):  # of publications that were killed
        path = os.path.join(root, name)
        if name.startswith(STAGING) and _is_old(path):
            shutil.rmtree(path)
    files = size = 0
    for folder in ("shards", "codes", "shortlist", "ann", "matcher", "check_samples", "deleted"):
        for file in versions.walk_files(os.path.join(root, folder)):
            if os.path.relpath(file, root) not in needed and _is_old(file):
                files += 1
                size += os.path.getsize(file)
                os.remove(file)
    return VacuumResult(len(old), files, size)


def _is_old(path: str) -> bool:
    """Return whether no publication that still runs put it there."""
    return time.time() - os.path.getmtime(path) > _DAY_S


def _is_compact(index: Index, rows: np.ndarray, size: int) -> bool:
    """Return whether `rows`, the live ones by pair_id, are all, in full shards, merged once."""
    cuts = [min(size, len(index) - start) for start in range(0, len(index), size)]
    return (
        np.array_equal(rows, np.arange(len(index)))
        and [part.rows for part in index.manifest.shards] == cuts
        and len(index.manifest.ann.parts) == 1
    )


@dataclass(frozen=True)
class _RewriteTask:
    root: str
    shas: Sequence[str]
    rows: np.ndarray = field(repr=False)
    tiles: pa.Table = field(repr=False)
    tower: str


def _rewrite(task: _RewriteTask) -> tuple[str, int, Files]:
    folders = [os.path.join(task.root, "shards", sha) for sha in task.shas]
    arrays = [shard.open_shard(folder, rereads=False)[0] for folder in folders]
    vectors = ShardedArray(arrays).take(task.rows)
    return store_shard(task.root, vectors, task.tiles, task.tower)


def _live_table(index: Index) -> pa.Table:
    """Return pair_id and row of the live tiles."""
    return pa.table({schema.PAIR_ID: index.live_ids, _ROW: index.live_rows})


def _separate_revived(
    writer: IndexWriter, written: Sequence[ShardInfo], info: IndexManifest
) -> tuple[tuple[ShardInfo, ...], Int64[np.ndarray, " row"]]:
    """Return the shards that are new, behind the others; and the rows of those that are there."""
    starts = {part.sha: part.row_start for part in info.shards}
    new = [(part.sha, part.rows, {}) for part in written if part.sha not in starts]
    rows = [starts[part.sha] + np.arange(part.rows) for part in written if part.sha in starts]
    return writer.number_shards(new, info.rows), np.concatenate([np.empty(0, np.int64), *rows])


def _shared_files(info: IndexManifest) -> Files:
    """Return the files that the next version shares."""
    return {name: file for name, file in info.files.items() if not name.startswith("versions/")}


def _derive_manifest(
    info: IndexManifest, shards: Sequence[ShardInfo], parts: Sequence[AnnPartInfo]
) -> IndexManifest:
    """Return the manifest of a change; what publishing adds is left out."""
    rows = sum(part.rows for part in shards)
    return replace(
        info,
        parent=info.version,
        rows=rows,
        shards=tuple(shards),
        ann=replace(info.ann, parts=tuple(parts)),
        shortlist=min(rows, max(info.shortlist, default_shortlist_size(rows))),
        tile_origin=None,
        request=None,
        recall=None,
        rejected=0,
    )


def _store_deleted(writer: IndexWriter, rows: Int64[np.ndarray, " row"]) -> str:
    path = os.path.join(writer.staging, "deleted.npy")
    np.save(path, rows)
    name, files = versions.move_file_into_place(writer.root, path, "deleted")
    others = {n: file for n, file in writer.files.items() if not n.startswith("deleted/")}
    writer.files = others | files
    return name
