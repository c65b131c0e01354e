"""Pictures of tiles -> tile_proj of each, by a pool of actors, in a stream that resumes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from cvmatch.data import manifest, schema, storage, tables
from cvmatch.data.pairs import PairDataset, read_pictures
from cvmatch.index import remote
from cvmatch.index.settings import GalleryConfig
from cvmatch.index.writer import Run
from cvmatch.match.infer import TILE_PROJ, EmbedTile, embed_tiles
from cvmatch.match.settings import Embed
from cvmatch.runtime import pools, session
from cvmatch.runtime.stream import Stream, write_stream

_COLUMNS = pa.schema(
    schema.SYNTHESIZED.field(name)
    for name in (schema.PAIR_ID, schema.AERIAL, schema.LATITUDE, schema.LONGITUDE, schema.ERROR)
)

_PARTS = _COLUMNS.remove(1).append(pa.field(TILE_PROJ, pa.large_list(pa.float16())))
"""What is kept of each: tile_proj in place of its picture."""


def dataset(gallery: GalleryConfig) -> ray.data.Dataset:
    """The rows of the tiles, with their pictures.

    Raises:
        ValueError: there are none, or they lack a column; or see `PairDataset.open`.
    """
    if not gallery.rows:
        first, *rest = [one.rows([schema.AERIAL]) for one in _open_pairs(gallery)]
        return first.union(*rest) if rest else first
    filesystem, path = storage.resolve(gallery.rows)
    have = tables.columns(gallery.rows)
    schema.require(have, (schema.PAIR_ID, schema.AERIAL), gallery.rows)
    if not sum(tables.rows(gallery.rows)):
        raise ValueError(f"{gallery.rows}: expected rows of tiles, got none. Nothing was done.")
    rows: Any = ray.data.read_parquet(
        path,
        filesystem=filesystem,
        columns=[name for name in _COLUMNS.names if name in have],
        file_extensions=["parquet"],
    )
    return rows.map_batches(
        schema.conform, fn_kwargs={"wanted": _COLUMNS}, batch_format="pyarrow", batch_size=None
    )


def embed(gallery: GalleryConfig, model: str, made_from: dict[str, Any]) -> tuple[str, float]:
    """tile_proj of all tiles by a pool of actors, as Parquet files: their location, and seconds.

    Raises:
        ValueError: see `dataset` and `write_stream`.
    """
    begin = time.monotonic()
    stream = Stream(
        label="embed tiles",
        output=storage.join(work_of(gallery.output, made_from), "parts"),
        provenance=made_from,
        rows=lambda: embed_tiles(dataset(gallery), Embed(model=model, pool=gallery.pool)),
        total=lambda: _count(gallery),
        columns=_PARTS,
        pools={"pool": gallery.pool},
        operators={"read": read_pictures.__name__, "embed": EmbedTile.__name__},
        max_rejected=gallery.max_rejected,
    )
    write_stream(stream)
    return stream.output, time.monotonic() - begin


def source(gallery: GalleryConfig) -> str:
    """Fingerprint of the tiles: names and sizes of their files."""
    if gallery.rows:
        return manifest.digest(tables.sizes(gallery.rows))
    return manifest.digest([one.fingerprint for one in _open_pairs(gallery)])


def _count(gallery: GalleryConfig) -> int:
    """Tiles; call it after `dataset`."""
    if gallery.rows:
        return sum(tables.rows(gallery.rows))
    return sum(one.count for one in _open_pairs(gallery, rechecked=True))


def _open_pairs(gallery: GalleryConfig, rechecked: bool = False) -> list[PairDataset]:
    splits = gallery.splits or (gallery.tiles.split,)
    tiles = replace(gallery.tiles, recheck=gallery.tiles.recheck and not rechecked)
    return [PairDataset.open(replace(tiles, split=split)) for split in splits]


def work_of(output: str, made_from: dict[str, Any]) -> str:
    """Directory of an unfinished build, named by what makes its rows."""
    place = storage.absolute(output.removeprefix("file://"))
    return storage.join(place, "building", manifest.digest(made_from)[:16])


def spread(uri: str) -> Run:
    """Ray's tasks; of an index in an object store on this node, which has its copy."""

    def run(function: Any, items: Sequence[Any]) -> list[Any]:
        session.start()
        return pools.map_tasks(function, items, on_this_node=remote.is_remote(uri))

    return run
