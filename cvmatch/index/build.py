"""Tiles -> the next version of an index: u of each tile, its shards, the shortlist, its recall."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import ray

from cvmatch import config as configs
from cvmatch import engine, ingest, manifest, progress, schema, storage, tables, tracking
from cvmatch.engine import Pool
from cvmatch.flow import Flow, each_step
from cvmatch.images import PREPROCESS
from cvmatch.index import ann, coarse, remote, shard, verify, versions
from cvmatch.index.draft import Draft, Entry, Run, draft, drawn, matcher, serially
from cvmatch.index.quality import measured
from cvmatch.index.queries import Queries, split_queries
from cvmatch.index.reader import EXHAUSTIVE
from cvmatch.ingest import Ingest
from cvmatch.match.identity import identity
from cvmatch.match.infer import Embed, EmbedTile, embed_tiles
from cvmatch.match.model import JointFeatureLearningNet
from cvmatch.written import Written

ENOUGH = {"top1": 0.99, "top10": 0.98}
"""Shares of the exact best tiles that a shortlist should hold."""

_SAMPLE = 65_536  # tiles from which a distilled head learns: 32 MiB of u

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Tiles, and the actors that embed them."""

    tiles: Ingest = field(default_factory=lambda: Ingest(split="val"))
    """Data set whose tiles are taken."""
    splits: tuple[Literal["train", "val"], ...] = ()
    """Splits of it that are taken; empty: only `tiles.split`."""
    rows: str = ""
    """URI of a directory of rows (as jobs/synthesize.py writes) to take instead of `tiles`: any
    Parquet files with pair_id and aerial, and where known latitude and longitude."""
    pool: Pool = field(default_factory=lambda: Pool(batch=32))
    """Actors that embed tiles."""
    max_rejected: float = 0.05
    """Largest share of rows without an embedding, in [0, 1]."""
    shard_rows: int = 100_000
    """Tiles of a shard, the unit of parallel work."""
    output: str = "data/index"
    """Directory of the index, local or in an object store; a new version joins those there. On
    several nodes: a path that all of them mount."""
    queries: str = ""
    """URI of synthesized rows for which the shortlist is measured (and, of other ones, from which a
    distilled head learns); their tiles need not be known. Empty: not measured."""
    sample: int = 200
    """Queries that measure it."""
    seed: int = 0
    """Of the draws of queries and of training vectors."""

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or self.sample < 1:
            raise ValueError(
                f"build_index: expected shard_rows and sample >= 1, got {self.shard_rows} and "
                f"{self.sample}."
            )


@dataclass(frozen=True, kw_only=True)
class BuildIndex(Gallery):
    """Embed tiles and publish them as the next version of an index."""

    model: str = "models/matcher"
    """Local directory of the matcher."""
    key: str = "auto"
    """FAISS factory key of the shortlist; "auto" chooses by the number of tiles (`ann.ladder`)."""
    probes: int = 64
    """Lists that a query visits, where the key has lists (IVF)."""
    shortlist: int = 0
    """Tiles that a two-stage search re-ranks exactly; 0 chooses by the number of tiles."""
    head: Literal["auto", "own", "distilled"] = "auto"
    """Whose vectors FAISS holds: the matcher's own, or a head's that is distilled from its scores
    on some of `queries`. auto: the own ones, unless they hold less of the exact answers than ENOUGH
    and distilled ones hold more (asked of more than 100,000 tiles, which need a shortlist)."""
    steps: int = coarse.STEPS
    """Steps of the distillation."""


def build(config: BuildIndex) -> dict[str, Any]:
    """Embed the tiles in a Ray pool and publish the index; gives its manifest.

    The same command goes on where a killed one stopped, and ends in the same files. Tiles that an
    earlier version holds, embedded by the same tower, are not embedded again.

    Raises:
        ValueError: see `publish`; or the pool does not fit the cluster.
    """
    engine.start()
    config = replace(config, model=os.path.abspath(os.path.expanduser(config.model)))
    made_from = _made_from(config)
    with tracking.start("index", config) as run:
        root = remote.fetched(config.output)
        kept = _kept(root, made_from)
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


def spread(uri: str) -> Run:
    """Ray's tasks; of an index in an object store on this node, which has its copy."""

    def run(function: Any, items: Sequence[Any]) -> list[Any]:
        return engine.tasks(function, items, here=remote.is_remote(uri))

    return run


def embed(gallery: Gallery, model: str, made_from: dict[str, Any]) -> tuple[str, float]:
    """u of all tiles by a pool of actors, as Parquet files: their location, and seconds."""
    work = work_of(gallery.output, made_from)
    written = Written(storage.join(work, "parts"))
    flow = Flow({"read": "read_pictures", "embed": EmbedTile.__name__, "write": "Write"})
    clock = Draft("", "", serially)
    with engine.resumable(storage.join(work, "checkpoint")), clock.timed("embed"):
        engine.preflight(gallery.pool)
        rows = embed_tiles(dataset(gallery), Embed(model=model, pool=gallery.pool))
        filesystem, path = storage.resolve(storage.make_directory(written.output))
        written.update(running=True)
        with (
            progress.watch("embed tiles", 0, lambda: written.rows, flow.note),
            each_step(rows, flow.update, lambda _: written.update(running=True)),
        ):
            rows.write_parquet(path, filesystem=filesystem)
    return written.output, clock.seconds["embed"]


def dataset(gallery: Gallery) -> ray.data.Dataset:
    """The rows of the tiles, with their pictures."""
    wanted = [schema.PAIR_ID, schema.AERIAL, schema.LATITUDE, schema.LONGITUDE, schema.ERROR]
    if not gallery.rows:
        first, *rest = [ingest.ingest(one) for one in _ingests(gallery)]
        return (first.union(*rest) if rest else first).select_columns(wanted)
    filesystem, path = storage.resolve(gallery.rows)
    have = next(tables.batches(gallery.rows, wanted, 1)).schema
    rows: Any = ray.data.read_parquet(path, filesystem=filesystem, file_extensions=["parquet"])
    return rows.select_columns([name for name in wanted if name in have.names])


def publish(
    parts: str,
    config: BuildIndex,
    run: Run = serially,
    made_from: dict[str, Any] | None = None,
    kept: dict[str, Any] | None = None,
    probes: pa.Table | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Make the rows of Parquet files (pair_id, u, latitude, longitude, error) the current version.

    `kept`: the manifest of a version whose shards are taken instead of `parts`. `probes`: tiles
    whose pictures are kept, to verify the index. `seconds`: what embedding took.

    Raises:
        ValueError: no good row, a pair_id twice, u of another width or not finite in half
            precision, or more than `max_rejected` of the rows failed.
    """
    root = remote.root(config.output)
    tiles, rejected = (None, []) if kept else shard.accepted(parts, config.max_rejected)
    with draft(root, run) as work:
        work.seconds["embed"] = seconds
        maker = work.heads(config.model)
        model, parts_of = matcher(root, maker), identity(config.model)
        if kept:
            entries = [{k: one[k] for k in ("sha", "rows", "row_start")} for one in kept["shards"]]
            same = ("shards/", "probes/")
            work.files |= {n: f for n, f in kept["files"].items() if n.startswith(same)}
        else:
            entries = work.shards(
                parts, tiles, model.config.hidden, {"tile": parts_of["tile"]}, config.shard_rows
            )
        info = _about(config, entries, model) | {
            "model": maker,
            "parts": parts_of,
            "made_from": made_from,
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
    info = info | {"queries": queries.models if queries else info["queries"]}
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
    model: JointFeatureLearningNet,
    queries: Queries | None,
) -> dict[str, Any]:
    """The entries of the manifest that say which shortlist there is; the best of those tried."""
    kinds = ["own", "distilled"] if config.head == "auto" else [config.head]
    if config.head == "auto" and (not queries or info["rows"] <= EXHAUSTIVE):
        kinds = ["own"]
    store, before, tried = work.store(entries), work.files, []
    for kind in kinds:
        work.files = dict(before)
        head = _head(work, kind, config, store, model, queries)
        name = work.template(head, info["ann"]["key"], store, config.seed)
        shards = work.codes(entries, name, info["model"])
        made = {"head": kind, "coarse": name, "shards": shards}
        made["ann"] = info["ann"] | {"parts": [work.merged(shards, name)]}
        made["recall"] = recalled(work, info | made, queries)
        tried.append((made, work.files))
        if made["recall"] and all(made["recall"][top] >= ENOUGH[top] for top in ENOUGH):
            break
    found, work.files = max(tried, key=lambda one: _held(one[0]["recall"]))
    return found


def _held(recall: dict[str, float] | None) -> float:
    return sum(recall[top] for top in ENOUGH) if recall else 0.0


def _head(
    work: Draft,
    kind: str,
    config: BuildIndex,
    store: shard.Store,
    model: JointFeatureLearningNet,
    queries: Queries | None,
) -> coarse.Head:
    if kind == "own":
        return coarse.Own(model)
    if queries is None:
        raise ValueError(
            "build_index: a distilled head learns from queries: pass --queries (synthesized rows), "
            "or --head own."
        )
    with work.timed("head"):
        sample = store.take(drawn(len(store), _SAMPLE, config.seed))
        return coarse.distil(model, queries.distil, sample, config.steps, config.seed)


def _about(
    config: BuildIndex, entries: list[Entry], model: JointFeatureLearningNet
) -> dict[str, Any]:
    rows = sum(entry["rows"] for entry in entries)
    width = model.config.hidden
    key = ann.ladder(rows, width) if config.key == "auto" else config.key
    return {
        "rows": rows,
        "hidden": width,
        "preprocess": PREPROCESS,
        "config": configs.plain(config),
        "ann": {"key": key, "probes": config.probes},
        "shortlist": min(rows, config.shortlist or ann.candidates(rows)),
        "deleted": None,
    }


def _made_from(config: BuildIndex) -> dict[str, Any]:
    """What u, and its cut into shards, depend on."""
    return {
        "tile": identity(config.model)["tile"],
        "preprocess": PREPROCESS,
        "shard_rows": config.shard_rows,
        "batch": config.pool.batch,  # the last bits of u depend on it
        "tiles": source(config),
    }


def source(gallery: Gallery) -> str:
    """Fingerprint of the tiles: names and sizes of their files."""
    if gallery.rows:
        filesystem, path = storage.resolve(gallery.rows)
        names = tables.files(gallery.rows)
        infos = filesystem.get_file_info([storage.join(path, name) for name in names])
        return manifest.digest([[name, one.size] for name, one in zip(names, infos, strict=True)])
    found = []
    for one in _ingests(gallery):
        ingest.ingest(one)  # lazy, but for its check of the files
        found.append(ingest.fingerprint(one))
    return manifest.digest(found)


def _ingests(gallery: Gallery) -> list[Ingest]:
    splits = gallery.splits or (gallery.tiles.split,)
    return [replace(gallery.tiles, split=split) for split in splits]


def _kept(root: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The newest version of just these shards, if its files are whole."""
    for name in reversed(versions.names(root)):
        info = versions.read(root, name)
        if info["made_from"] == made_from:
            shards = {n: one for n, one in info["files"].items() if n.startswith("shards/")}
            try:
                versions.check(root, shards, deep=True)
            except (FileNotFoundError, ValueError):
                continue
            return info
    return None


def work_of(output: str, made_from: dict[str, Any]) -> str:
    """Directory of an unfinished build, named by what makes its rows."""
    place = storage.absolute(output.removeprefix("file://"))
    return storage.join(place, "building", manifest.digest(made_from)[:16])


def _numbers(info: dict[str, Any]) -> dict[str, float | int]:
    found = {"rows": info["rows"], "rejected": info["rejected"]}
    for name in ("recall", "seconds", "tiles_per_s", "bytes_per_tile"):
        found |= {f"{name}/{key}": value for key, value in (info[name] or {}).items()}
    return found
