"""Synthesized rows + an index -> the best tiles of each row, in a stream on Ray that resumes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from cvmatch import config as configs
from cvmatch import engine, manifest, progress, schema, storage
from cvmatch.engine import Pool
from cvmatch.flow import Flow, each_step
from cvmatch.index.ranking import Mode, rank
from cvmatch.index.reader import Index
from cvmatch.match.fusion import Level
from cvmatch.match.infer import Embed, EmbedQuery, embed_queries
from cvmatch.search import query_of
from cvmatch.written import Written

TILES, SCORES = "tiles", "scores"
"""Columns of the output: pair_ids of the best tiles, best first, and their exact scores."""


@dataclass(frozen=True, kw_only=True)
class SearchRows:
    """Find the tiles of many panoramas."""

    rows: str = "data/synthesized/val"
    """URI of the rows (as jobs/synthesize.py writes)."""
    index: str = "data/index"
    """Directory of the index; a path that all nodes mount, or an object store."""
    output: str = "data/found"
    """URI of the directory of answers; the same command goes on where a killed one stopped."""
    level: Level = "G+A+S"
    """What a query consists of."""
    top_k: int = 10
    """Tiles to give for each row."""
    mode: Mode = "auto"
    """exact scores every tile, two-stage a shortlist; auto is exact up to 100,000 tiles."""
    embed: Pool = field(default_factory=lambda: Pool(batch=32))
    """Actors that embed queries."""
    rank: Pool = field(default_factory=lambda: Pool(batch=32))
    """Actors that search; each maps the index's files, which they share."""


class RankTiles:
    """`embedding`, `v` -> `tiles`, `scores`: a list for each row, empty where it has an `error`."""

    def __init__(self, index: str, version: str, top_k: int, mode: Mode) -> None:
        self.index, self.top_k = Index.open(index, version=version), top_k
        self.mode: Mode = mode

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch."""
        query = query_of(batch, self.index)
        ranked = rank(self.index, query, self.top_k, self.mode)
        tiles, scores = (np.empty(len(query.v), dtype=object) for _ in range(2))
        for row, error in enumerate(batch[schema.ERROR]):
            kept = 0 if error else int((ranked.rows[row] >= 0).sum())
            found = self.index.about(ranked.rows[row][:kept])
            tiles[row] = [tile[schema.PAIR_ID] for tile in found]
            scores[row] = ranked.scores[row][:kept].tolist()
        ids = {name: batch[name] for name in (schema.PAIR_ID, schema.ERROR)}
        return {**ids, TILES: tiles, SCORES: scores}


def search_rows(config: SearchRows) -> dict[str, Any]:
    """Write the answers and a manifest; gives the manifest. A whole output is left as it is.

    Raises:
        ValueError: the output holds other answers, or the pools do not fit the cluster.
    """
    output = storage.absolute(config.output).rstrip("/")
    index = Index.open(config.index)
    asked = {name: configs.plain(config)[name] for name in ("level", "top_k", "mode")}
    version = index.manifest["sha256"]
    written, source = Written(output), manifest.read(config.rows)
    if written.claim({"index": version, "rows": source, **asked}):
        return manifest.read(output)
    engine.start()
    pictures = [schema.GROUND, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES]
    columns = [schema.PAIR_ID, *pictures[: len(config.level.split("+"))], schema.ERROR]
    flow = Flow({"embed": EmbedQuery.__name__, "rank": RankTiles.__name__, "write": "Write"})
    with engine.resumable(storage.join(written.partial, "checkpoint")):
        engine.preflight(config.embed, config.rank)
        filesystem, path = storage.resolve(config.rows)
        rows: Any = ray.data.read_parquet(
            path, filesystem=filesystem, columns=columns, file_extensions=["parquet"]
        )
        seen = embed_queries(rows, Embed(model=index.heads, level=config.level, pool=config.embed))
        place = config.index if "://" in config.index else storage.absolute(config.index)
        # The version that embeds: another may become the current one while this runs.
        arguments = {
            "index": place,
            "version": index.manifest["version"],
            "top_k": config.top_k,
            "mode": config.mode,
        }
        found = engine.map_actors(seen, RankTiles, config.rank, **arguments)
        written.update(running=True)
        filesystem, path = storage.resolve(output)
        with (
            progress.watch("search", source["rows"], lambda: written.rows),
            each_step(found, flow.update, lambda _: written.update(running=True)),
        ):
            found.write_parquet(path, filesystem=filesystem)
    written.update()
    written.require(source["rows"])
    models = {"matcher": index.manifest["model"], "index": version}
    manifest.write(output, rows=written.rows, config=config, models=models, source=config.rows)
    storage.remove(written.partial)
    return manifest.read(output)
