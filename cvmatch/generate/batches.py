"""Rows of pairs -> the tensors that training reads, and their augmentation.

It imports no network: a Ray task that reads rows should not wait for diffusers (9 s of a core).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import torch
from jaxtyping import Bool, Float, UInt8
from ray.data import Dataset
from ray.data.expressions import col
from torch import Tensor

from cvmatch.data import images, schema, tables
from cvmatch.nn import rng
from cvmatch.training.held_out import select_pairs

GROUND_VIEW, AERIAL, AERIAL_MASK = "ground_view", "aerial", "aerial_mask"
LATENT, CLIP_TOKENS = "latent", "clip_tokens"
_ARRAYS = (GROUND_VIEW, AERIAL, AERIAL_MASK, LATENT, CLIP_TOKENS)

LATENT_ROWS = pa.schema(
    [
        pa.field(schema.PAIR_ID, pa.string(), nullable=False),
        pa.field("key", pa.int64()),
        *(pa.field(name, pa.binary()) for name in _ARRAYS),
        pa.field(schema.ERROR, pa.string()),  # why the row failed: then all but its id is null
    ]
)
"""Columns of the latent cache; arrays are .npy files (docs/decisions.md#latent-cache).

`ground_view` is the panorama as the BEV network sees it, `latent` the VAE's, `clip_tokens` are
CLIP's; each of the pair and then, where pairs are mirrored, of the mirrored one.
"""

_READ_ROWS = 32
"""Rows of a read batch (docs/decisions.md#latent-cache)."""


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of the images that a generator reads and writes, in pixels, from its configs."""

    panorama: tuple[int, int]
    """Height (CLIP's input) and width of the panorama."""
    tile: int
    """Side of the aerial image."""
    latent: int
    """Side of its latent, in cells."""


class PairBatch(NamedTuple):
    """A batch of pairs, each as it is or mirrored."""

    ground_view: Float[Tensor, "row 3 height width"]
    """Panoramas as the BEV network sees them, in [0, 1]."""
    tile: Float[Tensor, "row 3 size size"]
    """Tiles, in [0, 1]."""
    mask: UInt8[Tensor, "row size size"]
    """Class ids of the tiles, schema.IGNORE where unknown."""
    mirrored: Bool[Tensor, " row"]
    """Whether a pair is mirrored."""


def read_latents(directory: str, left_out: Sequence[str] = ()) -> Dataset:
    """Read the good rows of a latent cache, but for some pairs, as `to_tensors` returns them."""
    filesystem, paths = tables.list_paths(directory)
    stored: Any = ray.data.read_parquet(
        paths,
        filesystem=filesystem,
        file_extensions=None,
        # Else Ray splits the rows of few files into 200 blocks, and makes a task of each.
        override_num_blocks=len(paths),
    )
    good = stored.filter(expr=col(schema.ERROR).is_null())
    chosen: Any = select_pairs(good, left_out, inside=False) if left_out else good
    return chosen.map_batches(to_tensors, batch_size=_READ_ROWS)


def to_tensors(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Good rows of LATENT_ROWS -> the arrays of a training batch.

    `ground_view` is that of the panorama; where pairs are mirrored, `ground_view_mirrored` is that
    of the mirrored one.
    """
    arrays = {"key": batch["key"], **{name: _from_npy(batch[name]) for name in _ARRAYS}}
    views = arrays[GROUND_VIEW]
    mirrored = {f"{GROUND_VIEW}_mirrored": views[:, 1]} if views.shape[1] > 1 else {}
    return {**arrays, GROUND_VIEW: views[:, 0], **mirrored}


def to_npy(arrays: np.ndarray) -> np.ndarray:
    """Return each of these arrays as the bytes of an .npy file."""
    files = np.empty(len(arrays), dtype=object)
    for row, array in enumerate(arrays):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        files[row] = file.getvalue()
    return files


def to_pair_batch(batch: dict[str, Tensor]) -> PairBatch:
    """Return the pairs of a training batch as they are."""
    view, tile = batch[GROUND_VIEW].float() / 255, batch[AERIAL].float() / 255
    return PairBatch(
        view, tile, batch[AERIAL_MASK], torch.zeros_like(batch["key"], dtype=torch.bool)
    )


def augment(batch: dict[str, Tensor], mirror: bool, seed: int) -> PairBatch:
    """Return the pairs of a training batch; with `mirror`, half of them mirrored at random."""
    pairs = to_pair_batch(batch)
    if not mirror:
        return pairs
    stream = rng.fold_in(seed, int(batch["epoch"]), "variant")
    mirrored = rng.uniform(batch["key"], stream) >= 0.5
    rows = mirrored[:, None, None, None]
    view = batch[f"{GROUND_VIEW}_mirrored"].float() / 255
    return PairBatch(
        torch.where(rows, view, pairs.ground_view),
        torch.where(rows, pairs.tile.flip(-1), pairs.tile),
        torch.where(rows[:, 0], pairs.mask.flip(-1), pairs.mask),
        mirrored,
    )


def decode_pairs(batch: dict[str, np.ndarray], sizes: ImageSizes) -> dict[str, np.ndarray]:
    """Rows of PAIRS -> arrays of the rows without `error`.

    Returns:
        `ground` and `aerial` (uint8 planes), `aerial_mask` (class ids at the aerial's size,
        schema.IGNORE where the row has no class map) and `key`.

    Raises:
        images.BadImage: an image of such a row cannot be decoded.
    """
    good = [i for i, error in enumerate(schema.read_errors(batch[schema.ERROR])) if error is None]
    tile = (sizes.tile, sizes.tile)
    ground = [images.decode(batch[schema.GROUND][i], sizes.panorama) for i in good]
    aerial = [images.decode(batch[schema.AERIAL][i], tile) for i in good]
    masks = [_decode_mask(batch[schema.CLASSES][i], tile) for i in good]
    keys = [rng.row_key(str(batch[schema.PAIR_ID][i])) for i in good]
    return {
        schema.GROUND: _to_planes(ground, sizes.panorama),
        AERIAL: _to_planes(aerial, tile),
        AERIAL_MASK: np.array(masks, dtype=np.uint8).reshape(-1, *tile),
        "key": np.array(keys, dtype=np.int64),
    }


def to_pixels(planes: Float[Tensor, "row 3 height width"]) -> np.ndarray:
    """Return planes in [0, 1] as uint8 images (row, height, width, 3)."""
    return (planes * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _to_planes(pixels: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    if not pixels:
        return np.zeros((0, 3, *size), dtype=np.uint8)
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))


def _decode_mask(data: bytes | None, size: tuple[int, int]) -> np.ndarray:
    if not data:
        return np.full(size, schema.IGNORE, dtype=np.uint8)
    return images.decode_palette(data, size, len(schema.PALETTE))


def _from_npy(files: np.ndarray) -> np.ndarray:
    return np.stack([np.load(io.BytesIO(file), allow_pickle=False) for file in files])
