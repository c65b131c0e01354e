"""Rows with aerial pictures -> the same rows with maps of class ids."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from ray.data import Dataset

from cvmatch.data import images, schema
from cvmatch.nn import hub
from cvmatch.nn.batch_invariant import FixedBatch, error_line
from cvmatch.runtime import hardware, pools
from cvmatch.segment.model import Segmenter
from cvmatch.segment.settings import Segment

Batch = dict[str, np.ndarray]


class SegmentAerial:
    """`synthetic` (or `aerial`) picture -> `synthetic_classes`, a PNG of class ids (mode L).

    The map has the segmenter's own size. A row with an `error` passes through, its map null; a
    picture that cannot be decoded, or on which the network fails, becomes the `error` of its row.

    Args:
        model: Local directory of the segmenter.
        source: Column of the pictures.
        flip: Average the logits with those of the mirrored picture.
        batch: Rows a call of the network, whatever the number of rows at hand (`FixedBatch`).
    """

    def __init__(
        self, model: str, source: str = schema.SYNTHETIC, flip: bool = False, batch: int = 16
    ) -> None:
        hardware.keep_freed_memory()
        self.segmenter = Segmenter.load(model, hardware.device())
        self.source, self.flip = source, flip
        self.predict = FixedBatch(self._predict, batch)

    def __call__(self, batch: Batch) -> Batch:
        """Segment the pictures of one batch of rows."""
        schema.require(batch, (schema.PAIR_ID, self.source, schema.ERROR), "segment")
        errors = schema.read_errors(batch[schema.ERROR])
        tiles = dict(self._decode(batch[self.source], errors))
        maps: list[bytes | None] = [None] * len(errors)
        for row, ids in zip(tiles, self.predict(list(tiles.values())), strict=True):
            if isinstance(ids, Exception):
                errors[row] = f"segment: {error_line(ids)}"
            else:
                maps[row] = images.encode(ids)
        columns = {
            schema.SYNTHETIC_CLASSES: schema.object_array(maps),
            schema.ERROR: schema.object_array(errors),
        }
        return {**schema.with_nulls(batch), **columns}

    def _decode(
        self, column: np.ndarray, errors: list[str | None]
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "3 size size"]]]:
        """Yield row and pixels of each picture; write to `errors` why a row has none."""
        for row, data in enumerate(column):
            if errors[row] is None:
                try:
                    yield row, self.segmenter.preprocess.tile(data or b"")  # null: empty
                except images.BadImage as error:
                    errors[row] = f"segment: {self.source}: {error}"

    def _predict(self, tiles: list[np.ndarray]) -> list[np.ndarray]:
        pixels = torch.from_numpy(np.stack(tiles)).to(hardware.device())
        return list(self.segmenter.predict(pixels, flip=self.flip).cpu().numpy())


def segment(rows: Dataset, config: Segment) -> Dataset:
    """Add `synthetic_classes` to rows with the pictures of `config.source`; lazy."""
    return pools.map_actors(
        rows,
        SegmentAerial,
        config.pool,
        model=hub.absolute_or_hub_id(config.model),
        source=config.source,
        flip=config.flip,
        batch=config.pool.batch,
    )
