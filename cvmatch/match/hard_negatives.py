"""Batches in which near pairs meet: near in space at first, then near for the model."""

import functools
import os
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from ray.data import Dataset
from scipy.spatial import KDTree

from cvmatch.data import schema
from cvmatch.match.infer import EMBEDDING, TILE_PROJ, EmbedQuery, EmbedTile
from cvmatch.match.model import Matcher
from cvmatch.runtime import session
from cvmatch.runtime.settings import Pool

GROUP = 8
"""Rows that follow each other: one, and the nearest of the others that are not yet placed."""

_RANGE = 64
"""Nearest rows that are looked at for those."""

_PLACE = "place"


def mined(rows: Dataset, model: str, pool: Pool, seed: int) -> Dataset:
    """`rows` (encoded pairs) without error, in an order in which near ones follow each other.

    Near by the tiles that the matcher in the directory `model` ranks first for a row's panorama;
    before there is one (""), by coordinates, or at random where these are unknown: GPS first, then
    similarity, as Sample4Geo (Deuser et al. 2023), which draws other neighbours in each epoch.
    """
    ids, near = _by_model(rows, model, pool) if model else _by_place(rows)
    place = dict(zip(ids, grouped(near, GROUP, seed).argsort().tolist(), strict=True))
    stage: Any = functools.partial(_placed, place=place)
    kept = rows.map_batches(stage, batch_format="pyarrow", batch_size=None)
    # Once: the sort would be run again in each epoch. Pictures are encoded still.
    return kept.sort(_PLACE).drop_columns([_PLACE]).materialize()


def grouped(near: Int64[np.ndarray, "row k"], group: int, seed: int) -> Int64[np.ndarray, " row"]:
    """A permutation of the rows: groups of one row, drawn at random, and its nearest free ones.

    `near` lists the nearest rows of each, best first; the row itself and -1 are passed over.
    """
    free = np.ones(len(near), dtype=bool)
    order: list[int] = []
    for first in np.random.default_rng(seed).permutation(len(near)):
        if not free[first]:
            continue
        free[first] = False
        others = [row for row in near[first] if row >= 0 and free[row]][: group - 1]
        free[others] = False
        order += [int(first), *map(int, others)]
    return np.array(order, dtype=np.int64)


def nearest(
    query: Float[np.ndarray, "query dim"], tile: Float[np.ndarray, "tile dim"], count: int
) -> Int64[np.ndarray, "query {count}"]:
    """The `count` tiles of largest inner product with each query; -1 behind the last."""
    index = faiss.IndexFlatIP(tile.shape[1])
    index.add(np.ascontiguousarray(tile, dtype=np.float32))  # pyright: ignore
    found = index.search(np.ascontiguousarray(query, dtype=np.float32), count)  # pyright: ignore
    return found[1]


def _by_place(rows: Dataset) -> tuple[list[str], np.ndarray]:
    columns = [schema.PAIR_ID, schema.LATITUDE, schema.LONGITUDE, schema.ERROR]
    good = _good(rows.select_columns(columns).take_all())
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
    at = np.flatnonzero(~np.isnan(point).any(axis=1))
    near = np.full((len(ids), _RANGE), -1)
    if len(at):
        found = KDTree(point[at]).query(point[at], k=_RANGE)[1]  # len(at) behind the last
        near[at] = np.append(at, -1)[found]
    return ids, near


def _by_model(rows: Dataset, model: str, pool: Pool) -> tuple[list[str], np.ndarray]:
    """By the direct scores G against C, whose embeddings a FAISS index holds."""
    pairs = rows.select_columns([schema.PAIR_ID, schema.GROUND, schema.AERIAL, schema.ERROR])
    seen = session.map_actors(
        pairs, _EmbedPair, pool, model=os.path.abspath(model), batch=pool.batch
    )
    good = _good(seen.take_all())
    good.sort(key=lambda row: row[schema.PAIR_ID])
    net = Matcher.load(model)
    with torch.inference_mode():
        tile_proj = torch.from_numpy(np.stack([row[TILE_PROJ] for row in good])).float()
        tile = net.shortlist(tile_proj).numpy()
    query = np.stack([row[EMBEDDING] for row in good])
    return [row[schema.PAIR_ID] for row in good], nearest(query, tile, _RANGE)


class _EmbedPair:
    """`embedding` of modality G, and `tile_proj`, of each pair."""

    def __init__(self, model: str, batch: int) -> None:
        self.query, self.tile = EmbedQuery(model, "G"), EmbedTile(model, batch)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.query(batch)
        return self.tile({**batch, **found})


def _good(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    errors = schema.read_errors([row[schema.ERROR] for row in rows])
    return [row for row, error in zip(rows, errors, strict=True) if error is None]


def _placed(rows: pa.Table, place: dict[str, int]) -> pa.Table:
    """Rows that have a place, and their place. Arrow, since numpy has no null text, but NaN."""
    where = pa.array([place.get(name) for name in rows[schema.PAIR_ID].to_pylist()], pa.int64())
    return rows.append_column(_PLACE, where).filter(where.is_valid())
