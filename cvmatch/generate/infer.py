"""Sample the synthetic aerial of every row: adds the column `synthetic`."""

import numpy as np
import torch
from ray.data import Dataset

from cvmatch.data import images, schema, storage
from cvmatch.generate.batches import to_pixels
from cvmatch.generate.model import Generator, read_config
from cvmatch.generate.settings import Generate, Sampling
from cvmatch.nn import rng
from cvmatch.nn.batch_invariant import FixedBatch, error_line
from cvmatch.runtime import hardware, pools

KeyedPanorama = tuple[np.ndarray, int]
"""A panorama's pixels, uint8, and the key of its noise."""


class GenerateAerial:
    """`ground` (encoded) -> `synthetic` (PNG); a row with `error`, or a bad image, gets none.

    `batch`: rows a call of the network, whatever the number of rows at hand (`FixedBatch`).
    """

    def __init__(self, model: str, sampling: Sampling, batch: int = 32) -> None:
        hardware.keep_freed_memory()
        self.generator = Generator.load(model, hardware.device())
        self.sampling = sampling
        self.sample = FixedBatch(self._sample, batch)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sample one batch; the failed rows keep the reason in `error`."""
        errors = schema.read_errors(batch[schema.ERROR])
        keyed: dict[int, KeyedPanorama] = {}
        for row, data in enumerate(batch[schema.GROUND]):
            if errors[row] is not None:
                continue
            try:
                panorama = images.decode(data or b"", self.generator.panorama_size)
            except images.BadImage as error:
                errors[row] = f"generate: {schema.GROUND}: {error}"
            else:
                keyed[row] = panorama, rng.row_key(str(batch[schema.PAIR_ID][row]))
        synthetic = np.full(len(errors), None, dtype=object)
        for row, image in zip(keyed, self.sample(list(keyed.values())), strict=True):
            if isinstance(image, Exception):
                errors[row] = f"generate: {error_line(image)}"
            else:
                synthetic[row] = images.encode(image)
        return {**batch, schema.SYNTHETIC: synthetic, schema.ERROR: np.array(errors, dtype=object)}

    def _sample(self, rows: list[KeyedPanorama]) -> list[np.ndarray | Exception]:
        device = self.generator.device
        pixels, keys = zip(*rows, strict=True)
        panorama = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 255
        sampled = self.generator.sample(
            panorama, torch.tensor(keys, dtype=torch.int64, device=device), self.sampling
        )
        finite = sampled.isfinite().flatten(1).all(dim=1).tolist()
        return [
            image if fine else ArithmeticError("the image is not finite")
            for image, fine in zip(to_pixels(sampled), finite, strict=True)
        ]


def generate(rows: Dataset, config: Generate) -> Dataset:
    """Add `synthetic` to rows of PAIRS; null where the row has an `error`.

    Raises:
        ValueError: `config.model` is not a published generator.
    """
    model = storage.absolute(config.model)  # actors have another working directory
    read_config(model)
    return pools.map_actors(
        rows,
        GenerateAerial,
        config.pool,
        model=model,
        sampling=config,
        batch=config.pool.batch,
    )
