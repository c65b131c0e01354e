"""Synthesized rows + an index -> the best tiles of each row, in a stream on Ray that resumes."""

import logging
from functools import partial

import numpy as np
import pyarrow as pa
import ray.data
import torch

from cvmatch import config as configs
from cvmatch.data import manifest, row_files, schema, storage
from cvmatch.data.schema import QUERY_VECTOR
from cvmatch.index import versions
from cvmatch.index.reader import Index, rank
from cvmatch.index.settings import Mode
from cvmatch.match.infer import EmbedQuery, embed_queries
from cvmatch.match.settings import Embed
from cvmatch.runtime import hardware, pools
from cvmatch.runtime.streams.write import Stream, write_stream
from cvmatch.search.settings import SearchRows

TILES, SCORES = "tiles", "scores"
"""Columns of the output: pair_ids of the best tiles, best first, and their exact scores."""

RESULTS = pa.schema(
    [
        schema.SYNTHESIZED.field(schema.PAIR_ID),
        pa.field(TILES, pa.list_(pa.string())),
        pa.field(SCORES, pa.list_(pa.float64())),
        schema.SYNTHESIZED.field(schema.ERROR),
    ]
)
"""Columns on disk; a row with an `error` has empty lists."""

VERSION = 2  # 1 had no tiles in blocks of rows none of which had failed
"""Version of the results: those of another one are not gone on with."""

_log = logging.getLogger(__name__)


class RankTiles:
    """`query_vector` -> `tiles`, `scores`: lists, empty where a row has an `error`."""

    def __init__(self, index: str, version: str, top_k: int, mode: Mode) -> None:
        hardware.keep_freed_memory()
        self.index, self.top_k = Index.open(index, version=version), top_k
        self.mode: Mode = mode

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rank one batch."""
        query = torch.tensor(batch[QUERY_VECTOR], device=self.index.device)
        ranking = rank(self.index, query, self.top_k, self.mode)
        errors = schema.read_errors(batch[schema.ERROR])
        tiles, scores = (np.empty(len(errors), dtype=object) for _ in range(2))
        for row, error in enumerate(errors):
            count = int((ranking.rows[row] >= 0).sum()) if error is None else 0
            best = self.index.describe(ranking.rows[row][:count])
            tiles[row] = [tile["pair_id"] for tile in best]
            scores[row] = ranking.scores[row][:count].tolist()
        ids = {
            schema.PAIR_ID: batch[schema.PAIR_ID],
            schema.ERROR: np.array(errors, dtype=object),
        }
        return {**ids, TILES: tiles, SCORES: scores}


def search_rows(config: SearchRows) -> manifest.Manifest:
    """Write the results and a manifest; return the manifest. A whole output is left as it is.

    Rows that had failed before pass through, without tiles; but not if all have.

    Raises:
        ValueError: no row could be searched, or see `write_stream`.
    """
    stream = _stream(config, Index.open(config.index), manifest.read(config.rows))
    done = write_stream(stream)
    if done and done.failed:
        _log.warning("%d of %d rows have no result; see %s", done.failed, done.rows, done.rejected)
    return manifest.read(stream.output)


def _stream(config: SearchRows, index: Index, source: manifest.Manifest) -> Stream:
    settings = {name: configs.plain(config)[name] for name in ("modality", "top_k", "mode")}
    version = index.manifest.sha256
    models = {"matcher": index.manifest.model, "index": version}
    return Stream(
        label="search",
        output=storage.absolute(config.output).rstrip("/"),
        provenance={"answers": VERSION, "index": version, "rows": source, **settings},
        rows=partial(_rows, config, index),
        total=lambda: source["rows"],
        columns=RESULTS,
        pools={"embed": config.embed, "rank": config.rank},
        operators={"embed": EmbedQuery.__name__, "rank": RankTiles.__name__},
        max_rejected=1.0,
        retry_rejected=config.retry_rejected,
        dry_run=config.dry_run,
        manifest={"config": config, "models": models, "source": config.rows},
    )


def _rows(config: SearchRows, index: Index) -> ray.data.Dataset:
    columns = [schema.PAIR_ID, *schema.query_columns(config.modality), schema.ERROR]
    embedded = embed_queries(
        row_files.read(config.rows, columns, needed=columns),
        Embed(
            model=versions.locate_matcher(config.index, index.manifest.model),
            modality=config.modality,
            pool=config.embed,
        ),
    )
    location = storage.absolute(config.index)
    # The version that embeds: another may become the current one while this runs.
    version = index.manifest.version
    arguments = {"version": version, "top_k": config.top_k, "mode": config.mode}
    return pools.map_actors(embedded, RankTiles, config.rank, index=location, **arguments)
