"""Rows with aerial pictures -> the same rows with maps of class ids."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from ray.data import Dataset

from cvmatch.data import images, schema
from cvmatch.nn import hub
from cvmatch.runtime import hardware, pools
from cvmatch.runtime.batch_invariant import FixedBatch, error_line
from cvmatch.segment.model import Segmenter
from cvmatch.segment.settings import Segment

Batch = dict[str, np.ndarray]


class SegmentAerial:
    """`synthetic` (or `aerial`) picture -> `synthetic_classes`, a PNG of class ids (mode L).

    The map has the segmenter's own size; with `tile`, a larger picture's map has the picture's. A
    row with an `error` passes through, its map null; a picture that cannot be decoded, or on which
    the network fails, becomes the `error` of its row.
    """

    def __init__(
        self,
        model: str,
        source: str = schema.SYNTHETIC,
        flip: bool = False,
        overlap: float | None = None,
        batch: int = 16,
    ) -> None:
        """`overlap` of the windows that larger pictures are read in; None: they are resized.

        `batch`: rows a call of the network, whatever the number of rows at hand (`FixedBatch`).
        """
        hardware.keep_freed_memory()
        self.segmenter = Segmenter.load(model, hardware.device())
        self.source, self.flip, self.overlap = source, flip, overlap
        self.label = FixedBatch(self._label, batch)
        self.label_large = FixedBatch(self._label_large, 1)

    def __call__(self, batch: Batch) -> Batch:
        """Segment the pictures of one batch of rows."""
        schema.require(batch, (schema.PAIR_ID, self.source, schema.ERROR), "segment")
        errors = schema.read_errors(batch[schema.ERROR])
        size = self.segmenter.preprocess.size
        tiles, found = {}, {}
        for row, picture in self._pictures(batch[self.source], errors):
            if picture.shape[1:] == (size, size):
                tiles[row] = picture
            else:  # at once: a batch of them may be gigabytes
                found[row] = self.label_large([picture])[0]
        found |= zip(tiles, self.label(list(tiles.values())), strict=True)
        maps: list[bytes | None] = [None] * len(errors)
        for row, ids in found.items():
            if isinstance(ids, Exception):
                errors[row] = f"segment: {error_line(ids)}"
            else:
                maps[row] = images.encode(ids)
        added = {schema.SYNTHETIC_CLASSES: _objects(maps), schema.ERROR: _objects(errors)}
        return {**schema.with_nulls(batch), **added}

    def _pictures(
        self, column: np.ndarray, errors: list[str | None]
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "3 h w"]]]:
        """Row and pixels of each picture; puts in `errors` why a row has none."""
        for row, data in enumerate(column):
            if errors[row] is None:
                try:
                    yield row, self._pixels(data or b"")  # null: empty
                except images.BadImage as error:
                    errors[row] = f"segment: {self.source}: {error}"

    def _pixels(self, data: bytes) -> UInt8[np.ndarray, "3 h w"]:
        """Pixels at the segmenter's size, or at the picture's own if it is to be cut in windows."""
        preprocess = self.segmenter.preprocess
        if self.overlap is not None:
            own = images.decode(data).transpose(2, 0, 1)
            if max(own.shape[1:]) > preprocess.size:
                return own
        return preprocess.tile(data)

    def _label(self, tiles: list[np.ndarray]) -> list[np.ndarray]:
        pixels = torch.from_numpy(np.stack(tiles)).to(hardware.device())
        return list(self.segmenter.predict(pixels, flip=self.flip).cpu().numpy())

    def _label_large(self, pictures: list[np.ndarray]) -> list[np.ndarray]:
        assert self.overlap is not None, "pictures are resized"
        pixels = torch.tensor(pictures[0], device=hardware.device())
        ids = self.segmenter.predict_large(pixels, overlap=self.overlap, flip=self.flip)
        return [ids.cpu().numpy()]


def segment(rows: Dataset, config: Segment) -> Dataset:
    """Add `synthetic_classes` to rows with the pictures of `config.source`; lazy."""
    return pools.map_actors(
        rows,
        SegmentAerial,
        config.pool,
        model=hub.absolute_or_hub_id(config.model),
        source=config.source,
        flip=config.flip,
        overlap=config.overlap if config.tile else None,
        batch=config.pool.batch,
    )


def _objects(values: list[Any]) -> np.ndarray:
    """An object array, which may hold None, of bytes that numpy would otherwise pad and strip."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
