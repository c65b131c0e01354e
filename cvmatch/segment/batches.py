"""Encoded rows -> the tensors that training and inference read, by one `Preprocess`.

It imports no model: a task that decodes should not wait for transformers (9 s of a core).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from cvmatch.data import images, schema, storage
from cvmatch.nn import rng

FILE = "preprocess.json"
"""File of the model directory that holds its `Preprocess`."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How pictures and masks become tensors."""

    size: int = 512
    """Height and width of the network's input and of the masks, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue in [0, 1] that is subtracted (ImageNet's, as SegFormer's)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue that is divided by."""
    num_classes: int = 5
    """Classes: 5 (cars are ignored, as in CVUSA's published subset) or 6."""
    version: str = images.PREPROCESS
    """Name of the decoder and resizer (`images.PREPROCESS`)."""

    def __post_init__(self) -> None:
        if self.num_classes not in (5, 6):
            raise ValueError(
                f"num_classes: expected 5 (without cars) or 6, got {self.num_classes}."
            )
        if self.size < 32 or self.size % 32:
            raise ValueError(
                f"size: expected a multiple of 32 (SegFormer's stride), got {self.size}."
            )
        if self.version != images.PREPROCESS:
            raise ValueError(
                f"{FILE}: the model was trained on pictures decoded by {self.version!r}, this is "
                f"{images.PREPROCESS!r}. Train it again, or use the release that trained it."
            )

    @classmethod
    def read(cls, location: str) -> "Preprocess":
        """Read the preprocessing of a model directory. Raises FileNotFoundError if it has none."""
        values = storage.read_json(storage.join(location, FILE))
        tuples = {name: tuple(values[name]) for name in ("mean", "std")}  # lists in JSON
        return cls(**values | tuples)

    def tile(self, data: bytes) -> UInt8[np.ndarray, "3 size size"]:
        """Decode a picture at the network's size. Raises images.BadImage."""
        return images.decode(data, (self.size, self.size)).transpose(2, 0, 1)

    def mask(self, data: bytes) -> UInt8[np.ndarray, "size size"]:
        """Decode a palette picture to class ids, nearest pixel, IGNORE where no class fits.

        Raises:
            images.BadImage: not a picture, or grey: then it is no palette picture.
        """
        return images.decode_palette(data, (self.size, self.size), self.num_classes)

    def normalise(self, tiles: Num[Tensor, "n 3 size size"]) -> Float[Tensor, "n 3 size size"]:
        """Normalise values in [0, 255] to the network's input.

        Raises:
            ValueError: the tiles have another size than the model was trained with.
        """
        if tuple(tiles.shape[-2:]) != (self.size, self.size):
            raise ValueError(
                f"segmenter: expected tiles of {self.size} x {self.size} pixels, the size it was "
                f"trained with, got {tuple(tiles.shape[-2:])}. Decode them with its Preprocess."
            )
        mean = torch.tensor(self.mean, device=tiles.device)[:, None, None]
        std = torch.tensor(self.std, device=tiles.device)[:, None, None]
        return (tiles.float() / 255 - mean) / std


def decode(batch: dict[str, np.ndarray], preprocess: Preprocess) -> dict[str, np.ndarray]:
    """Decode rows to `aerial`, `aerial_mask`, `key`; skip those without map or with `error`.

    Raises:
        images.BadImage: a picture of another row cannot be decoded, though ingest has passed it.
    """
    columns = (schema.PAIR_ID, schema.AERIAL, schema.CLASSES)
    errors = schema.read_errors(batch[schema.ERROR])
    tiles, masks, keys = [], [], []
    rows = zip(errors, *map(batch.__getitem__, columns), strict=True)
    for error, name, aerial, classes in rows:
        if error is not None or not classes:
            continue
        try:
            tiles.append(preprocess.tile(aerial))
            masks.append(preprocess.mask(classes))
        except images.BadImage as bad:
            raise images.BadImage(f"segment: pair {name}: {bad}") from bad
        keys.append(rng.row_key(str(name)))
    side = preprocess.size
    return {
        "aerial": np.array(tiles, dtype=np.uint8).reshape(-1, 3, side, side),
        "aerial_mask": np.array(masks, dtype=np.uint8).reshape(-1, side, side),
        "key": np.array(keys, dtype=np.int64),
    }


def decode_synthesized(
    batch: dict[str, np.ndarray], preprocess: Preprocess, share: float, seed: int
) -> dict[str, np.ndarray]:
    """Decode a `share` of rows of SYNTHESIZED, with A in the place of C."""
    return decode(select_synthesized(batch, share, seed), preprocess)


def select_synthesized(
    batch: dict[str, np.ndarray], share: float, seed: int = 0
) -> dict[str, np.ndarray]:
    """Select a share of rows of SYNTHESIZED for `decode`, with A in the place of C.

    `share` is in [0, 1]; id and `seed` alone decide which. Their ids differ from those of the true
    pictures, so that augmentation is drawn for each by itself.
    """
    names = [str(name) for name in batch[schema.PAIR_ID]]
    keys = torch.tensor([rng.row_key(name) for name in names], dtype=torch.int64)
    taken = (rng.uniform(keys, rng.fold_in(seed, purpose="synthesized")) < share).numpy()
    rows = {
        schema.PAIR_ID: np.array([f"{name} {schema.SYNTHETIC}" for name in names], dtype=object),
        schema.AERIAL: batch[schema.SYNTHETIC],
        schema.CLASSES: batch[schema.CLASSES],
        schema.ERROR: batch[schema.ERROR],
    }
    return {column: values[taken] for column, values in rows.items()}
