"""A SegFormer of a few channels, and small pictures and rows for it."""

from typing import Any

import numpy as np
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cvmatch.data import images, schema

SIZE = 64


def segformer(num_labels: int, **changes: Any) -> SegformerForSemanticSegmentation:
    """A SegFormer of 8 to 16 channels, without dropout so that two passes agree."""
    small: dict[str, Any] = {"num_labels": num_labels}
    small |= {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4}
    small |= {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "decoder_hidden_size": 16}
    torch.manual_seed(0)
    return SegformerForSemanticSegmentation(SegformerConfig(**small, **changes))


def picture(seed: int, height: int = 90, width: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def planes(seed: int, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """A picture as the network's input wants it: (3, height, width)."""
    return torch.from_numpy(picture(seed, height, width)).permute(2, 0, 1).contiguous()


def batch_of(tile: torch.Tensor, mask: torch.Tensor, epoch: int = 0) -> dict[str, torch.Tensor]:
    return {
        "aerial": tile,
        "aerial_mask": mask,
        "key": torch.arange(len(tile)),
        "epoch": torch.tensor(epoch),
    }


def rows_of(**changes: list) -> dict[str, np.ndarray]:
    """Three rows with pictures and class maps."""
    maps = [images.encode(images.colours_of(np.full((90, 70), i, np.uint8))) for i in range(3)]
    columns = {
        schema.PAIR_ID: ["0000007", "0000008", "0000009"],
        schema.AERIAL: [images.encode(picture(i)) for i in range(3)],
        schema.SYNTHETIC: [images.encode(picture(9 - i)) for i in range(3)],
        schema.CLASSES: maps,
        schema.ERROR: [None, None, None],
    }
    arrays = {name: np.empty(3, dtype=object) for name in columns}
    for name, values in {**columns, **changes}.items():
        arrays[name][:] = values
    return arrays
