"""Pictures -> embedded tiles, by a pool of actors, and embedded queries, in this process."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from jaxtyping import Float
from torch import Tensor

from cvmatch.data import manifest, row_files, schema, storage, tables
from cvmatch.data.pairs import PairDataset, read_pictures
from cvmatch.data.schema import QUERY_VECTOR, TILE_VECTOR
from cvmatch.index.manifest import SAMPLING, QueryOrigin
from cvmatch.index.settings import GalleryConfig
from cvmatch.index.shard import CHUNK
from cvmatch.index.writer import TaskMapper
from cvmatch.match.infer import EmbedQuery, EmbedTile, embed_tiles
from cvmatch.match.model import read_config
from cvmatch.match.settings import BRANCHES_OF, Embed, Modality
from cvmatch.runtime import hardware, pools, session
from cvmatch.runtime.streams.write import Stream, write_stream

RECALL_QUERIES = 200
"""Queries at most that measure a shortlist."""

_STEP = 64  # queries whose pictures are decoded at a time

FULLEST: dict[str, Modality] = {"G": "G", "GA": "G+A", "GAS": "G+A+S"}
"""The modality of queries that have all the letters that a matcher looks at."""

_log = logging.getLogger(__name__)

_COLUMNS = pa.schema(
    schema.SYNTHESIZED.field(name)
    for name in (schema.PAIR_ID, schema.AERIAL, schema.LATITUDE, schema.LONGITUDE, schema.ERROR)
)

_PARTS = _COLUMNS.remove(1).append(pa.field(TILE_VECTOR, pa.large_list(pa.float16())))


def read_gallery(gallery: GalleryConfig) -> ray.data.Dataset:
    """Read the rows of the tiles, with their pictures.

    Raises:
        ValueError: there are none, or they lack a column; or see `PairDataset.open`.
    """
    if not gallery.rows:
        first, *rest = [split.rows([schema.AERIAL]) for split in _open_pairs(gallery)]
        return first.union(*rest) if rest else first
    return row_files.read(gallery.rows, _COLUMNS.names, needed=(schema.PAIR_ID, schema.AERIAL))


def embed_gallery(
    gallery: GalleryConfig, model: str, inputs: dict[str, object]
) -> tuple[str, float]:
    """Embed all tiles by a pool of actors; return the directory of Parquet files, and seconds.

    `inputs`: all that the rows depend on; an unfinished directory of the same is gone on with.

    Raises:
        ValueError: see `read_gallery` and `write_stream`.
    """
    begin = time.monotonic()
    stream = Stream(
        label="embed tiles",
        output=storage.join(building_directory(gallery.output, inputs), "parts"),
        provenance=inputs,
        rows=lambda: embed_tiles(read_gallery(gallery), Embed(model=model, pool=gallery.pool)),
        total=lambda: _count(gallery),
        columns=_PARTS,
        pools={"pool": gallery.pool},
        operators={"read": read_pictures.__name__, "embed": EmbedTile.__name__},
        max_rejected=gallery.max_rejected,
        retry_rejected=gallery.retry_rejected,
        dry_run=gallery.dry_run,
    )
    write_stream(stream)
    return stream.output, time.monotonic() - begin


def find_left_out(gallery: GalleryConfig) -> list[tables.Reject]:
    """Return the tiles that are not embedded, since nothing names them, and say how many."""
    left_out = tables.find_nameless(gallery.rows) if gallery.rows else []
    if left_out:
        reason = left_out[0][schema.ERROR]
        _log.warning("%s: %d rows are left out: %s", gallery.rows, len(left_out), reason)
    return left_out


def fingerprint_gallery(gallery: GalleryConfig) -> str:
    """Hash names and sizes of the tiles' files."""
    if gallery.rows:
        return manifest.digest(tables.sizes(gallery.rows))
    return manifest.digest([split.fingerprint for split in _open_pairs(gallery)])


def building_directory(output: str, inputs: dict[str, object]) -> str:
    """Return the directory of an unfinished build, named by what makes its rows."""
    location = storage.absolute(output.removeprefix("file://"))
    return storage.join(location, "building", manifest.digest(inputs)[:16])


def ray_map(uri: str) -> TaskMapper:
    """Map by Ray's tasks; of an index in an object store by threads, since its copy is here.

    Not by tasks that Ray pins to this node: the head of a cluster has no CPU for one.
    """

    def run(function: Any, items: Sequence[Any]) -> list[Any]:
        session.start()
        if not storage.is_remote(uri):
            return pools.map_tasks(function, items)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(function, items))

    return run


@dataclass(frozen=True)
class QuerySample:
    """Embedded queries that measure an index."""

    ids: Sequence[str]
    """pair_id of each."""
    modalities: Mapping[Modality, Float[Tensor, "query width"]]
    """Their vectors by what they consist of, the fullest that the model knows last."""
    origin: QueryOrigin
    """What made the rows."""

    @property
    def vectors(self) -> Float[Tensor, "query width"]:
        """Those of the fullest modality."""
        return list(self.modalities.values())[-1]


def sample_queries(location: str, model: str, seed: int) -> QuerySample | None:
    """Embed at most RECALL_QUERIES rows; None where `location` is empty.

    Raises:
        ValueError: no row has the pictures that the model's queries consist of.
    """
    if not location:
        return None
    ids = [
        pair_id
        for table in tables.batches(location, [schema.PAIR_ID, schema.ERROR], CHUNK)
        for pair_id in schema.good_rows(table)[schema.PAIR_ID].to_pylist()
    ]
    chosen = np.random.default_rng(seed).permutation(ids).tolist()[:RECALL_QUERIES]
    config = read_config(model)
    fullest = FULLEST[config.letters]
    pictures = schema.query_columns(fullest)
    columns = [schema.PAIR_ID, *pictures, schema.ERROR]
    rows = pa.concat_tables(
        table.filter(pc.field(schema.PAIR_ID).isin(chosen))
        for table in tables.batches(location, columns)
    )
    modalities: list[Modality] = [
        modality
        for modality in FULLEST.values()
        if fullest.startswith(modality)
        and (config.score == "joint" or {*config.branches}.intersection(BRANCHES_OF[modality]))
    ]
    embedded: dict[Modality, Tensor] = {m: _embed(rows, model, m) for m in modalities}
    good = ~torch.stack([vectors.isnan().any(1) for vectors in embedded.values()]).any(0)
    if not good.any():
        raise ValueError(
            f"build-index: expected {pictures} in some rows of {location}, got none. "
            "Run cvmatch synthesize on them, or leave --queries out."
        )
    known = [i for i, there in zip(rows[schema.PAIR_ID].to_pylist(), good, strict=True) if there]
    vectors: dict[Modality, Tensor] = {m: part[good] for m, part in embedded.items()}
    return QuerySample(known, vectors, _read_origin(location))


def _count(gallery: GalleryConfig) -> int:
    """Count the tiles; call it after `read_gallery`."""
    if gallery.rows:
        return tables.count(gallery.rows)
    return sum(split.count for split in _open_pairs(gallery))


def _open_pairs(gallery: GalleryConfig) -> list[PairDataset]:
    splits = gallery.splits or (gallery.tiles.split,)
    return [PairDataset.open(replace(gallery.tiles, split=split)) for split in splits]


def _read_origin(location: str) -> QueryOrigin:
    if not storage.exists(storage.join(location, manifest.NAME)):
        return QueryOrigin()
    rows = manifest.read(location)
    known = rows["config"].get("generate", {})
    return QueryOrigin(
        generator=rows["models"].get("generator", ""),
        segmenter=rows["models"].get("segmenter", ""),
        sampling={name: known[name] for name in SAMPLING if name in known},
    )


def _embed(rows: pa.Table, model: str, modality: Modality) -> Float[Tensor, "query width"]:
    """Embed rows; NaN for those that cannot be."""
    embed = EmbedQuery(model, modality)
    columns = [schema.PAIR_ID, *schema.query_columns(modality), schema.ERROR]
    parts = [
        embed({name: step[name].to_numpy() for name in columns})
        for step in (rows.slice(at, _STEP) for at in range(0, len(rows), _STEP))
    ]
    errors = [error for part in parts for error in schema.read_errors(part[schema.ERROR])]
    vectors = np.concatenate([part[QUERY_VECTOR] for part in parts])
    vectors[[error is not None for error in errors]] = np.nan
    return torch.from_numpy(vectors).to(hardware.device())
