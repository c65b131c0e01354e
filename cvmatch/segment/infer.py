"""Rows with aerial pictures -> the same rows with maps of class ids."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from ray.data import Dataset

from cvmatch import engine, hub, images, schema
from cvmatch.segment.model import Segmenter

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment the aerial pictures of rows."""

    model: str = "models/segmenter"
    """URI of the directory that training published."""
    source: Literal["synthetic", "aerial"] = "synthetic"
    """Column of the pictures: the generated ones, or the true ones."""
    pool: engine.Pool = field(default_factory=engine.Pool)
    """Actors that hold the model."""


class SegmentAerial:
    """`synthetic` (or `aerial`) picture -> `synthetic_classes`, a PNG of class ids (mode L).

    The map has the segmenter's own size. A row with an `error` passes through, its map null; a
    picture that cannot be decoded becomes the `error` of its row.
    """

    def __init__(self, model: str, source: str = schema.SYNTHETIC) -> None:
        self.segmenter = Segmenter.load(model, engine.device())
        self.source = source

    def __call__(self, batch: Batch) -> Batch:
        """Segment the pictures of one batch of rows."""
        schema.require(batch, (schema.PAIR_ID, self.source, schema.ERROR), "segment")
        errors = [error if isinstance(error, str) else None for error in batch[schema.ERROR]]
        tiles = {}
        for row, data in enumerate(batch[self.source]):
            if errors[row] is None:
                try:
                    tiles[row] = self.segmenter.preprocess.tile(data or b"")  # null: empty
                except images.BadImage as error:
                    errors[row] = f"segment: {self.source}: {error}"
        maps: list[bytes | None] = [None] * len(errors)
        for row, ids in zip(tiles, self._ids(list(tiles.values())), strict=True):
            maps[row] = images.encode(ids)
        added = {schema.SYNTHETIC_CLASSES: _objects(maps), schema.ERROR: _objects(errors)}
        return {**batch, **added}

    def _ids(self, tiles: list[np.ndarray]) -> np.ndarray:
        if not tiles:
            return np.empty((0, 0, 0), dtype=np.uint8)
        pixels = torch.from_numpy(np.stack(tiles)).to(engine.device())
        return self.segmenter.predict(pixels).cpu().numpy()


def segment(rows: Dataset, config: Segment) -> Dataset:
    """Add `synthetic_classes` to rows with the pictures of `config.source`; lazy."""
    return engine.map_actors(
        rows, SegmentAerial, config.pool, model=hub.anywhere(config.model), source=config.source
    )


def _objects(values: list[Any]) -> np.ndarray:
    """An object array, which may hold None, of bytes that numpy would otherwise pad and strip."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
