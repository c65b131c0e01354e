"""Hard negatives: an order of the rows in which near pairs share batches.

Near in space at first, then near for the model, as Sample4Geo (Deuser et al. 2023), which draws
other neighbours in each epoch.
"""

import functools
import os
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64
from ray.data import Dataset
from scipy.spatial import KDTree

from cvmatch.data import schema
from cvmatch.data.schema import QUERY_VECTOR, TILE_VECTOR
from cvmatch.match.infer import EmbedQuery, EmbedTile
from cvmatch.match.model import read_config
from cvmatch.runtime import pools
from cvmatch.runtime.settings import Pool

GROUP = 8
"""Rows that follow each other: one, and the nearest of the others that have no group yet."""

_NEIGHBOURS = 64
"""Nearest rows that are looked at for those."""

_POSITION = "position"


def order_hard_negatives(rows: Dataset, model: str, pool: Pool, seed: int) -> Dataset:
    """Sort rows without error so that near ones follow each other.

    Near by the tiles that the matcher ranks first for a row's panorama; without a model by
    coordinates, or at random where these are unknown.

    Args:
        rows: Encoded pairs.
        model: Directory of the matcher; "": there is none yet.
        pool: Actors that embed the pairs.
        seed: Seed of the order.
    """
    ids, neighbours = (
        _neighbours_by_score(rows, model, pool) if model else _neighbours_in_space(rows)
    )
    order = group_neighbours(neighbours, GROUP, seed)
    position = dict(zip(ids, order.argsort().tolist(), strict=True))
    stage: Any = functools.partial(_add_position, position=position)
    good = rows.map_batches(stage, batch_format="pyarrow", batch_size=None)
    # Once: the sort would be run again in each epoch. Pictures are encoded still.
    return good.sort(_POSITION).drop_columns([_POSITION]).materialize()


def group_neighbours(
    neighbours: Int64[np.ndarray, "row k"], group: int, seed: int
) -> Int64[np.ndarray, " row"]:
    """Permute the rows to groups of one row, drawn at random, and its nearest free ones.

    Args:
        neighbours: Nearest rows of each, best first; the row itself and -1 are passed over.
        group: Rows of a group.
        seed: Seed of the permutation.
    """
    free = np.ones(len(neighbours), dtype=bool)
    order: list[int] = []
    for first in np.random.default_rng(seed).permutation(len(neighbours)):
        if not free[first]:
            continue
        free[first] = False
        others = [row for row in neighbours[first] if row >= 0 and free[row]][: group - 1]
        free[others] = False
        order += [int(first), *map(int, others)]
    return np.array(order, dtype=np.int64)


def nearest_tiles(
    query: Float[np.ndarray, "query dim"], tile: Float[np.ndarray, "tile dim"], count: int
) -> Int64[np.ndarray, "query {count}"]:
    """Find the `count` tiles of largest inner product with each query; -1 behind the last."""
    index = faiss.IndexFlatIP(tile.shape[1])
    index.add(np.ascontiguousarray(tile, dtype=np.float32))  # pyright: ignore
    return index.search(np.ascontiguousarray(query, dtype=np.float32), count)[1]  # pyright: ignore


def _neighbours_in_space(rows: Dataset) -> tuple[list[str], np.ndarray]:
    """Sorted ids, and for each row the nearest by coordinates."""
    columns = [schema.PAIR_ID, schema.LATITUDE, schema.LONGITUDE, schema.ERROR]
    good = _drop_failed(rows.select_columns(columns).take_all())
    ids = sorted(row[schema.PAIR_ID] for row in good)
    known = {row[schema.PAIR_ID]: (row[schema.LATITUDE], row[schema.LONGITUDE]) for row in good}
    angle = np.radians([[np.nan if x is None else x for x in known[name]] for name in ids])
    latitude, longitude = angle.reshape(-1, 2).T
    # Points on the unit sphere.
    point = np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.sin(latitude),
        ],
        axis=1,
    )
    located = np.flatnonzero(~np.isnan(point).any(axis=1))
    neighbours = np.full((len(ids), _NEIGHBOURS), -1)
    if len(located):  # KDTree answers len(located) behind the last
        nearest = KDTree(point[located]).query(point[located], k=_NEIGHBOURS)[1]
        neighbours[located] = np.append(located, -1)[nearest]
    return ids, neighbours


def _neighbours_by_score(rows: Dataset, model: str, pool: Pool) -> tuple[list[str], np.ndarray]:
    """Sorted ids, and for each row the tiles of best direct score (G against C), by FAISS."""
    pairs = rows.select_columns([schema.PAIR_ID, schema.GROUND, schema.AERIAL, schema.ERROR])
    embedded = pools.map_actors(
        pairs, _EmbedPair, pool, model=os.path.abspath(model), batch=pool.batch
    )
    good = _drop_failed(embedded.take_all())
    good.sort(key=lambda row: row[schema.PAIR_ID])
    width = read_config(model).shortlist_width
    query, tile = (
        np.stack([row[name][:width] for row in good]) for name in (QUERY_VECTOR, TILE_VECTOR)
    )
    return [row[schema.PAIR_ID] for row in good], nearest_tiles(query, tile, _NEIGHBOURS)


class _EmbedPair:
    """`query_vector` of modality G, and `tile_vector`, of each pair."""

    def __init__(self, model: str, batch: int) -> None:
        self.query, self.tile = EmbedQuery(model, "G"), EmbedTile(model, batch)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.tile({**batch, **self.query(batch)})


def _drop_failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    errors = schema.read_errors([row[schema.ERROR] for row in rows])
    return [row for row, error in zip(rows, errors, strict=True) if error is None]


def _add_position(rows: pa.Table, position: dict[str, int]) -> pa.Table:
    """Rows that have a position, and it. Arrow, since numpy has no null text, but NaN."""
    values = pa.array([position.get(name) for name in rows[schema.PAIR_ID].to_pylist()], pa.int64())
    return rows.append_column(_POSITION, values).filter(values.is_valid())
