"""Draw the synthetic aerial of every row: adds the column `synthetic`."""

import dataclasses

import numpy as np
import torch
from ray.data import Dataset

from cvmatch import draws, engine, images, schema, storage
from cvmatch.generate.model import Generator, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw synthetic aerials with a trained generator."""

    model: str = "models/generator"
    """Local directory that train_generator published."""
    steps: int = 12
    """Solver steps; 4 to 12 identify the tile equally well (reference/world.md, section 8)."""
    guidance: float = 2.0
    """Guidance scale; 1: none, half the time; 4 oversaturates."""
    seed: int = 0
    """Other seeds draw other pictures of the same panorama."""
    pool: engine.Pool = dataclasses.field(default_factory=lambda: engine.Pool(batch=32))
    """Actors."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"generate: expected steps of at least 1, got {self.steps}")


class GenerateAerial:
    """`ground` (encoded) -> `synthetic` (PNG); a row with `error`, or a bad picture, gets none."""

    def __init__(self, model: str, steps: int, guidance: float, seed: int) -> None:
        self.generator = Generator.load(model, engine.device())
        self.steps, self.guidance, self.seed = steps, guidance, seed

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch; the failed rows keep the reason in `error`."""
        errors = np.array(batch[schema.ERROR], dtype=object)
        drawn = np.full(len(errors), None, dtype=object)
        pictures, good = [], []
        for index, data in enumerate(batch[schema.GROUND]):
            if errors[index]:
                continue
            try:
                pictures.append(images.decode(data or b"", self.generator.panorama_size))
                good.append(index)
            except images.BadImage as error:
                errors[index] = f"generate: {schema.GROUND}: {error}"
        if good:
            keys = [draws.key(str(batch[schema.PAIR_ID][index])) for index in good]
            for index, picture in zip(good, self._draw(pictures, keys), strict=True):
                drawn[index] = images.encode(picture)
        return {**batch, schema.SYNTHETIC: drawn, schema.ERROR: errors}

    def _draw(self, pictures: list[np.ndarray], keys: list[int]) -> np.ndarray:
        at = self.generator.device
        panorama = torch.from_numpy(np.stack(pictures)).to(at).permute(0, 3, 1, 2).float() / 255
        drawn = self.generator.sample(
            panorama,
            torch.tensor(keys, dtype=torch.int64, device=at),
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
        )
        return (drawn * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def generate(rows: Dataset, config: Generate) -> Dataset:
    """Add `synthetic` to rows of PAIRS; null where the row has an `error`.

    Raises:
        ValueError: `config.model` is not a published generator.
    """
    model = storage.absolute(config.model)  # actors have another working directory
    require(model)
    return engine.map_actors(
        rows,
        GenerateAerial,
        config.pool,
        model=model,
        steps=config.steps,
        guidance=config.guidance,
        seed=config.seed,
    )
