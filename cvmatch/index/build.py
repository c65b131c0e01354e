"""Tiles -> the next version of an index: tile projections, shards, the shortlist, its recall."""

import contextlib
import json
import logging
import os
from dataclasses import replace
from typing import Any

import pyarrow as pa

from cvmatch import config as configs
from cvmatch.data import manifest, storage, tables
from cvmatch.data.images import PREPROCESS
from cvmatch.index import ann, remote, shard, shortlist_head, verify, versions
from cvmatch.index.gallery import dataset, embed, source, spread, work_of
from cvmatch.index.quality import measured
from cvmatch.index.queries import Queries, split_queries
from cvmatch.index.reader import EXHAUSTIVE
from cvmatch.index.settings import BuildIndex
from cvmatch.index.writer import Draft, Entry, Run, draft, drawn, matcher, serially
from cvmatch.match.fusion import Fusion
from cvmatch.match.model import fingerprint_parts
from cvmatch.runtime import session, tracking

ENOUGH = {"top1": 0.99, "top10": 0.98}
"""Shares of the exact best tiles that a shortlist should hold."""

_SAMPLE = 65_536  # tiles from which a distilled head learns: 32 MiB of tile_proj

_log = logging.getLogger(__name__)


def build(config: BuildIndex) -> dict[str, Any]:
    """Embed the tiles in a Ray pool and publish the index; gives its manifest.

    The same command goes on where a killed one stopped, and ends in the same files. Tiles that an
    earlier version holds, embedded by the same tower, are not embedded again. Where the current
    version is what is asked for, and whole, it stays, and none is published.

    Raises:
        ValueError: see `publish`; or the pool does not fit the cluster.
    """
    session.start()
    config = replace(config, model=os.path.abspath(os.path.expanduser(config.model)))
    made_from = _made_from(config)
    root = remote.fetched(config.output)
    kept = _kept(root, made_from)
    if kept and _is_whole(root, kept, config):
        _log.info("version %s is this index already: nothing to do", kept["version"])
        remote.pushed(config.output, kept["version"])  # that of a killed build may lack files there
        return kept
    with tracking.start("index", config) as run:
        if kept:
            _log.info("tiles are those of version %s: not embedded again", kept["version"])
            info = publish("", config, spread(config.output), made_from, kept=kept)
        else:
            parts, seconds = embed(config, config.model, made_from)
            probes = verify.probes_of(pa.Table.from_pylist(dataset(config).take(verify.PROBES)))
            run_tasks = spread(config.output)
            info = publish(parts, config, run_tasks, made_from, probes=probes, seconds=seconds)
            storage.remove(work_of(config.output, made_from))
        remote.pushed(config.output, info["version"])
        run.metrics(_numbers(info))
        run.text(json.dumps(info, indent=2, sort_keys=True), "manifest.json")
    return info


def publish(
    parts: str,
    config: BuildIndex,
    run: Run = serially,
    made_from: dict[str, Any] | None = None,
    kept: dict[str, Any] | None = None,
    probes: pa.Table | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Make rows of Parquet files the current version: pair_id, tile_proj, position, error.

    `kept`: the manifest of a version whose shards are taken instead of `parts`. `probes`: tiles
    whose pictures are kept, to verify the index. `seconds`: what embedding took.

    Raises:
        ValueError: no good row, a pair_id twice, tile_proj of another width or not finite in half
            precision, or more than `max_rejected` of the rows failed.
    """
    root = remote.root(config.output)
    tiles, rejected = (None, []) if kept else shard.accepted(parts, config.max_rejected)
    with draft(root, run) as work:
        work.seconds["embed"] = seconds
        maker = work.heads(config.model)
        model, parts_of = matcher(root, maker), fingerprint_parts(config.model)
        if kept:
            entries = [{k: one[k] for k in ("sha", "rows", "row_start")} for one in kept["shards"]]
            same = ("shards/", "probes/")
            work.files |= {n: f for n, f in kept["files"].items() if n.startswith(same)}
        else:
            entries = work.shards(
                parts, tiles, model.hidden, {"tile": parts_of["tile"]}, config.shard_rows
            )
        info = _about(config, entries, model) | {
            "model": maker,
            "parts": parts_of,
            "made_from": made_from,
            "asked": _asked(config),
            "rejected": len(rejected) if not kept else kept["rejected"],
            "queries": {},
        }
        queries = split_queries(config.queries, config.model, config.sample, config.seed)
        info |= _shortlisted(work, config, info, entries, model, queries)
        info["probes"] = kept["probes"] if kept else verify.store_probes(work, probes)
        return finished(work, info, queries, rejected)


def finished(
    work: Draft, info: dict[str, Any], queries: Queries | None, rejected: list[dict[str, str]]
) -> dict[str, Any]:
    """Publish a version, with its times and sizes; gives its manifest."""
    info = info | {"queries": queries.made_by if queries else info["queries"]}
    info["seconds"] = {stage: round(value, 3) for stage, value in work.seconds.items()}
    info["tiles_per_s"] = {
        stage: round(info["rows"] / value, 1) for stage, value in work.seconds.items() if value
    }
    served = ("shards/", "ann/")
    total = sum(one["bytes"] for name, one in work.files.items() if name.startswith(served))
    ann_bytes = sum(work.files[one["file"]]["bytes"] for one in info["ann"]["parts"])
    info["bytes_per_tile"] = {
        "all": round(total / info["rows"], 2),
        "ann": round(ann_bytes / info["rows"], 2),
    }
    info["files"] = work.files
    lines = "".join(json.dumps(row) + "\n" for row in rejected)
    return versions.commit(work.root, info, {"rejected.jsonl": lines.encode()})


def recalled(work: Draft, info: dict[str, Any], queries: Queries | None) -> dict[str, Any] | None:
    """Recall of a version that is not published yet; None without queries."""
    if not queries:
        return None
    with work.timed("recall"):
        return measured(work.root, info, queries.measure)


def _shortlisted(
    work: Draft,
    config: BuildIndex,
    info: dict[str, Any],
    entries: list[Entry],
    model: Fusion,
    queries: Queries | None,
) -> dict[str, Any]:
    """The entries of the manifest that say which shortlist there is; the best of those tried."""
    kinds = ["own", "distilled"] if config.head == "auto" else [config.head]
    if config.head == "auto" and (not queries or info["rows"] <= EXHAUSTIVE):
        kinds = ["own"]
    store, files, seconds, tried = work.store(entries), work.files, work.seconds, []
    for kind in kinds:
        work.files, work.seconds = dict(files), dict(seconds)
        head = _head(work, kind, config, store, model, queries)
        name = work.template(head, info["ann"]["key"], store, config.seed)
        shards = work.codes(entries, name, info["model"])
        made = {"head": kind, "coarse": name, "shards": shards}
        made["ann"] = info["ann"] | {"parts": [work.merged(shards, name)]}
        made["recall"] = recalled(work, info | made, queries)
        tried.append((made, work.files, work.seconds))
        if recall := made["recall"]:
            held = [100 * recall[top] for top in ENOUGH]
            _log.info("%s head: holds %.1f %% of the exact first, %.1f %% of the ten", kind, *held)
            if all(recall[top] >= ENOUGH[top] for top in ENOUGH):
                break
    best = max(tried, key=lambda one: _held(one[0]["recall"]))
    found, work.files, work.seconds = best
    if others := [sum(one[2].values()) - sum(seconds.values()) for one in tried if one is not best]:
        work.seconds["discarded"] = sum(others)
    return found


def _held(recall: dict[str, float] | None) -> float:
    return sum(recall[top] for top in ENOUGH) if recall else 0.0


def _head(
    work: Draft,
    kind: str,
    config: BuildIndex,
    store: shard.Store,
    model: Fusion,
    queries: Queries | None,
) -> shortlist_head.Head:
    if kind == "own":
        return shortlist_head.MatcherHead(model)
    if queries is None:
        raise ValueError(
            "build_index: a distilled head learns from queries: pass --queries (synthesized rows), "
            "or --head own."
        )
    with work.timed("head"):
        sample = store.take(drawn(len(store), _SAMPLE, config.seed))
        return shortlist_head.distil(model, queries.distil, sample, config.steps, config.seed)


def _about(config: BuildIndex, entries: list[Entry], model: Fusion) -> dict[str, Any]:
    rows = sum(entry["rows"] for entry in entries)
    width = model.hidden
    key = ann.default_factory_key(rows, width) if config.key == "auto" else config.key
    return {
        "rows": rows,
        "hidden": width,
        "preprocess": PREPROCESS,
        "config": configs.plain(config),
        "ann": {"key": key, "probes": config.probes},
        "shortlist": min(rows, config.shortlist or ann.default_shortlist_size(rows)),
        "deleted": None,
    }


def _made_from(config: BuildIndex) -> dict[str, Any]:
    """What tile_proj, and its cut into shards, depend on."""
    return {
        "tile": fingerprint_parts(config.model)["tile"],
        "preprocess": PREPROCESS,
        "shard_rows": config.shard_rows,
        "batch": config.pool.batch,  # the last bits of tile_proj depend on it
        "tiles": source(config),
    }


def _asked(config: BuildIndex) -> str:
    """Fingerprint of all that a build depends on but for its tiles: settings, matcher, queries."""
    seen = tables.sizes(config.queries) if config.queries else []
    return manifest.digest([configs.plain(config), fingerprint_parts(config.model), seen])


def _is_whole(root: str, info: dict[str, Any], config: BuildIndex) -> bool:
    """Whether a version with the right shards is the current one, as asked for and undamaged."""
    if info["version"] != versions.current(root) or info.get("asked") != _asked(config):
        return False
    with contextlib.suppress(FileNotFoundError, ValueError):
        versions.check(root, info["files"], deep=True)
        return True
    return False


def _kept(root: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The newest version of just these shards, if its files are whole."""
    for name in reversed(versions.names(root)):
        # One of another format, or damaged, is no help, but must not be in the way either.
        with contextlib.suppress(FileNotFoundError, ValueError):
            info = versions.read(root, name)
            if info["made_from"] == made_from:
                shards = {n: one for n, one in info["files"].items() if n.startswith("shards/")}
                versions.check(root, shards, deep=True)
                return info
    return None


def _numbers(info: dict[str, Any]) -> dict[str, float | int]:
    found = {"rows": info["rows"], "rejected": info["rejected"]}
    for name in ("recall", "seconds", "tiles_per_s", "bytes_per_tile"):
        found |= {f"{name}/{key}": value for key, value in (info[name] or {}).items()}
    return found
