"""Synthesized rows + an index -> the best tiles of each row, in a stream on Ray that resumes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cvmatch import config as configs
from cvmatch import engine, manifest, schema, storage
from cvmatch.engine import Pool
from cvmatch.index.ranking import Mode, rank
from cvmatch.index.reader import Index
from cvmatch.match.fusion import Level
from cvmatch.match.infer import Embed, EmbedQuery, embed_queries
from cvmatch.search import query_of
from cvmatch.stream import Stream, write_stream

TILES, SCORES = "tiles", "scores"
"""Columns of the output: pair_ids of the best tiles, best first, and their exact scores."""

ANSWERS = pa.schema(
    [
        schema.SYNTHESIZED.field(schema.PAIR_ID),
        pa.field(TILES, pa.list_(pa.string())),
        pa.field(SCORES, pa.list_(pa.float64())),
        schema.SYNTHESIZED.field(schema.ERROR),
    ]
)
"""Columns of the output; both lists are empty where a row failed."""


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
        errors = schema.read_errors(batch[schema.ERROR])
        for row, error in enumerate(errors):
            kept = 0 if error else int((ranked.rows[row] >= 0).sum())
            found = self.index.about(ranked.rows[row][:kept])
            tiles[row] = [tile[schema.PAIR_ID] for tile in found]
            scores[row] = ranked.scores[row][:kept].tolist()
        ids = {name: batch[name] for name in (schema.PAIR_ID, schema.ERROR)}
        return {**ids, TILES: tiles, SCORES: scores}


def search_rows(config: SearchRows) -> dict[str, Any]:
    """Write the answers and a manifest; returns the manifest. A whole output is left as it is.

    Raises:
        ValueError: the output holds other answers, the pools do not fit the cluster, or no row has
            an answer.
    """
    output = storage.absolute(config.output).rstrip("/")
    index = Index.open(config.index)
    asked = {name: configs.plain(config)[name] for name in ("level", "top_k", "mode")}
    version = index.manifest["sha256"]
    source = manifest.read(config.rows)
    # The version that embeds: another may become the current one while this runs.
    arguments = {
        "index": config.index if "://" in config.index else storage.absolute(config.index),
        "version": index.manifest["version"],
        "top_k": config.top_k,
        "mode": config.mode,
    }
    embed = Embed(model=index.heads, level=config.level, pool=config.embed)
    stream = Stream(
        label="search",
        rows=lambda: engine.map_actors(
            embed_queries(_read(config), embed), RankTiles, config.rank, **arguments
        ),
        total=lambda: source["rows"],
        pools=(config.embed, config.rank),
        operators={"embed": EmbedQuery.__name__, "rank": RankTiles.__name__},
        columns=ANSWERS,
        max_rejected=1.0,  # the rows that synthesis let pass
    )
    write_stream(
        stream,
        output,
        {"index": version, "rows": source, **asked},
        config=config,
        models={"matcher": index.manifest["model"], "index": version},
        source=config.rows,
    )
    return manifest.read(output)


def _read(config: SearchRows) -> ray.data.Dataset:
    pictures = [schema.GROUND, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES]
    columns = [schema.PAIR_ID, *pictures[: len(config.level.split("+"))], schema.ERROR]
    filesystem, path = storage.resolve(config.rows)
    rows: Any = ray.data.read_parquet(
        path, filesystem=filesystem, columns=columns, file_extensions=["parquet"]
    )
    return rows
