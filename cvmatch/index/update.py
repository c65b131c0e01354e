"""Tiles join an index, leave it, and its pieces become one again; each makes a new version."""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cvmatch.data import schema, storage
from cvmatch.index import ann, build, gallery, remote, shard, verify, versions
from cvmatch.index.queries import split_queries
from cvmatch.index.reader import Index
from cvmatch.index.settings import AddTiles, Compact, DeleteTiles, GalleryConfig, Vacuum
from cvmatch.index.shard import Store
from cvmatch.index.writer import ASIDE, Draft, Entry, Run, draft, place_shard, serially
from cvmatch.runtime import session

_log = logging.getLogger(__name__)

_ROW = "row"
_DAY_S = 86_400.0

PIECES = 16
"""Parts of the shortlist at most: each is searched by itself."""


def add(config: AddTiles) -> dict[str, Any]:
    """Embed the tiles in a Ray pool and add them; gives the new manifest.

    Raises:
        ValueError: see `join`.
    """
    session.start()
    root = remote.fetched(config.output)
    info = versions.read(root)
    tile = info["parts"]["tile"]
    # Of no version: an addition that was refused goes on to another one with what it embedded.
    made_from = {"job": "add", "tile": tile, "tiles": gallery.source(config)}
    heads = os.path.join(root, "heads", info["model"])
    parts, seconds = gallery.embed(config, heads, made_from)
    new = join(parts, config, gallery.spread(config.output), seconds, tile)
    remote.pushed(config.output, new["version"])
    storage.remove(gallery.work_of(config.output, made_from))
    return new


def join(
    parts: str,
    config: GalleryConfig,
    run: Run = serially,
    seconds: float = 0.0,
    tile: str = "",
) -> dict[str, Any]:
    """Add the rows of Parquet files (see `build.publish`) to the current version.

    A shard of just those tiles that were deleted is there still: its rows live again. `tile`: the
    tower (`fingerprint_parts`) that embedded the rows, which has to be the version's.

    Raises:
        ValueError: an id is there already, or another tower; as `build.publish`; or see
            `versions.commit`.
    """
    root = remote.root(config.output)
    index = Index.open(root)
    info = index.manifest
    if tile and tile != info["parts"]["tile"]:
        raise ValueError(
            f"index {root}: the tiles were embedded by the tower {tile}, but {info['version']} was "
            f"built meanwhile with {info['parts']['tile']}. Nothing was added. Run it again."
        )
    tiles, rejected = shard.accepted(parts, config.max_rejected)
    both = tiles.filter(pc.field(schema.PAIR_ID).isin(index.living_ids))[schema.PAIR_ID]
    if len(both):
        raise ValueError(
            f"index {root}: {len(both)} of {len(tiles)} tiles are there already, such as "
            f"{both.slice(0, 3).to_pylist()}. Delete them first (jobs/index.py delete), or leave "
            "them out."
        )
    with draft(root, run) as work:
        work.seconds["embed"] = seconds
        work.files |= _lasting(info)
        maker = {"tile": info["parts"]["tile"]}
        given = work.shards(parts, tiles, info["hidden"], maker, config.shard_rows)
        added, back = _sorted_out(work, given, info)
        added = work.codes(added, info["coarse"], info["model"])
        shards, pieces = [*info["shards"], *added], info["ann"]["parts"]
        if added and len(pieces) < PIECES:
            pieces = [*pieces, work.merged(added, info["coarse"])]
        elif added:
            work.files = {n: f for n, f in work.files.items() if not n.startswith("ann/")}
            pieces = [work.merged(shards, info["coarse"])]
        new = _changed(info, shards, pieces) | {"rejected": len(rejected)}
        if len(back):
            new["deleted"] = _store_dead(work, np.setdiff1d(index.dead, back))
        queries = split_queries(config.queries, index.heads, config.sample, config.seed)
        new["recall"] = build.recalled(work, new, queries)
        return build.finished(work, new, queries, rejected)


def delete(config: DeleteTiles) -> dict[str, Any]:
    """Delete tiles; returns the new manifest, and as `missing` how many of the ids were not there.

    Raises:
        ValueError: none of the ids is there; these are all tiles; or see `versions.commit`.
    """
    root = remote.fetched(config.output)
    index = Index.open(root)
    lines = storage.read_text(config.file).splitlines() if config.file else ()
    wanted = {*config.ids, *(line.strip() for line in lines if line.strip())}
    numbered = _numbered(index)
    there = numbered.filter(pc.field(schema.PAIR_ID).isin(pa.array(sorted(wanted), pa.string())))
    missing = sorted(wanted - set(there[schema.PAIR_ID].to_pylist()))
    if not len(there):
        raise ValueError(
            f"index {root}: expected ids of tiles that are there (--ids or --file), got "
            f"{len(wanted)}, of which none is, such as {missing[:3]}. Nothing was deleted."
        )
    if missing:
        _log.warning(
            "%d of %d ids are not in the index, such as %s: the other %d are deleted",
            len(missing), len(wanted), missing[:3], len(there),
        )  # fmt: skip
    dead = np.union1d(index.dead, there[_ROW].to_numpy())
    if len(dead) == len(index):
        raise ValueError(f"index {root}: these are all its tiles. Remove the directory instead.")
    with draft(root) as work:
        work.files |= _lasting(index.manifest)
        new = _changed(index.manifest, index.manifest["shards"], index.manifest["ann"]["parts"])
        new["deleted"] = _store_dead(work, dead)
        info = build.finished(work, new | {"rejected": 0}, None, [])
    remote.pushed(config.output, info["version"])
    return info | {"missing": len(missing)}


def compact(config: Compact, run: Run = serially) -> dict[str, Any]:
    """Write the living tiles as new shards by pair_id, with the same head; returns the manifest.

    Where they are so already, it is that of the current version, and none is published.

    Raises:
        ValueError: see `versions.commit`.
    """
    root = remote.fetched(config.output)
    index = Index.open(root)
    info = index.manifest
    rows = _numbered(index).sort_by(schema.PAIR_ID)[_ROW].to_numpy()
    size = info["config"]["shard_rows"]
    if _is_compact(index, rows, size):
        _log.info("version %s is compact already: nothing to do", info["version"])
        return info
    shas = tuple(one["sha"] for one in info["shards"])
    maker = {"tile": info["parts"]["tile"]}
    tasks = [
        _Rewrite(root, shas, rows[at : at + size], index.tiles.take(rows[at : at + size]), maker)
        for at in range(0, len(rows), size)
    ]
    with draft(root, run) as work:
        kept = ("heads/", "coarse/")
        work.files |= {n: f for n, f in info["files"].items() if n.startswith(kept)}
        with work.timed("shards"):
            shards = work.placed(run(_rewrite, tasks))
        shards = work.codes(shards, info["coarse"], info["model"])
        new = _changed(info, shards, [work.merged(shards, info["coarse"])])
        new |= {"rejected": 0, "deleted": None}
        new["probes"] = verify.store_probes(work, verify.living_probes(root, index))
        done = build.finished(work, new, None, [])
    remote.pushed(config.output, done["version"])
    return done


def vacuum(config: Vacuum) -> dict[str, int]:
    """Remove old versions of a local index; gives how many, and the files and bytes.

    Raises:
        ValueError: an index in an object store.
    """
    if remote.is_remote(config.output):
        raise ValueError(f"vacuum: expected a local index, got {config.output}.")
    root = remote.root(config.output)
    with versions.alone(root):
        return _collected(root, config.keep)


def _is_compact(index: Index, rows: np.ndarray, size: int) -> bool:
    """Whether `rows`, the living ones by pair_id, are all, in full shards and one shortlist."""
    cuts = [min(size, len(index) - at) for at in range(0, len(index), size)]
    return (
        np.array_equal(rows, np.arange(len(index)))
        and [one["rows"] for one in index.manifest["shards"]] == cuts
        and len(index.manifest["ann"]["parts"]) == 1
    )


def _collected(root: str, keep: int) -> dict[str, int]:
    names = versions.names(root)
    current = versions.read(root)["version"]
    old = [name for name in names if name != current]
    old = old[: max(0, len(names) - keep)]
    kept = {
        file for name in names if name not in old for file in versions.read(root, name)["files"]
    }
    gone = {"versions": len(old), "files": 0, "bytes": 0}
    for name in old:
        shutil.rmtree(os.path.join(root, "versions", name))
    for name in os.listdir(root):  # of publications that were killed
        path = os.path.join(root, name)
        if name.startswith(ASIDE) and _is_old(path):
            shutil.rmtree(path)
    for kind in ("shards", "codes", "coarse", "ann", "heads", "probes", "deleted"):
        for file in versions.walk(os.path.join(root, kind)):
            if os.path.relpath(file, root) not in kept and _is_old(file):
                gone["files"] += 1
                gone["bytes"] += os.path.getsize(file)
                os.remove(file)
    return gone


def _is_old(path: str) -> bool:
    """Whether no publication that still runs put it there."""
    return time.time() - os.path.getmtime(path) > _DAY_S


@dataclass(frozen=True)
class _Rewrite:
    root: str
    shas: Sequence[str]
    rows: np.ndarray = field(repr=False)
    tiles: pa.Table = field(repr=False)
    maker: dict[str, str]


def _rewrite(task: _Rewrite) -> tuple[str, int, versions.Files]:
    folders = [os.path.join(task.root, "shards", sha) for sha in task.shas]
    store = Store([shard.read(folder, rereads=False)[0] for folder in folders])
    return place_shard(task.root, store.take(task.rows), task.tiles, task.maker)


def _numbered(index: Index) -> pa.Table:
    """pair_id and row of the living tiles."""
    return pa.table({schema.PAIR_ID: index.living_ids, _ROW: index.living})


def _sorted_out(
    work: Draft, given: Sequence[Entry], info: dict[str, Any]
) -> tuple[list[Entry], np.ndarray]:
    """Shards that are new, behind the others; and the rows of those that are there already."""
    there = {one["sha"]: one["row_start"] for one in info["shards"]}
    new = [(one["sha"], one["rows"], {}) for one in given if one["sha"] not in there]
    rows = [there[one["sha"]] + np.arange(one["rows"]) for one in given if one["sha"] in there]
    return work.placed(new, info["rows"]), np.concatenate([np.empty(0, np.int64), *rows])


def _lasting(info: dict[str, Any]) -> versions.Files:
    """Files that the next version shares."""
    return {n: one for n, one in info["files"].items() if not n.startswith("versions/")}


def _changed(
    info: dict[str, Any], shards: Sequence[Entry], pieces: Sequence[Entry]
) -> dict[str, Any]:
    """The manifest of a change; what `versions.commit` and `finished` add is left out."""
    rows = sum(one["rows"] for one in shards)
    asked = info["config"]["shortlist"]
    return info | {
        "parent": info["version"],
        "rows": rows,
        "shards": list(shards),
        "ann": info["ann"] | {"parts": list(pieces)},
        "shortlist": min(rows, asked or ann.default_shortlist_size(rows)),
        "made_from": None,
        "asked": None,
        "recall": None,
    }


def _store_dead(work: Draft, dead: np.ndarray) -> str:
    path = os.path.join(work.aside, "deleted.npy")
    np.save(path, dead)
    name, files = versions.place_file(work.root, path, "deleted")
    work.files = {n: one for n, one in work.files.items() if not n.startswith("deleted/")} | files
    return name
