"""SegFormer with its preprocessing: encoded pictures in, maps of class ids out.

`Preprocess` is the only way from bytes to the network, for training and for inference, and is saved
beside the weights: a segmenter cannot be run at another size or normalisation than it was trained.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from PIL import Image
from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation

from cvmatch import hub, images, schema, storage

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
        """The preprocessing of a model directory. Raises FileNotFoundError if it has none."""
        values: dict[str, Any] = storage.read_json(storage.join(location, FILE))
        for name in ("mean", "std"):
            values[name] = tuple(values[name])  # lists in JSON
        return cls(**values)

    def tile(self, data: bytes) -> UInt8[np.ndarray, "3 size size"]:
        """Pixels of an encoded picture at the network's size. Raises images.BadImage."""
        return images.decode(data, (self.size, self.size)).transpose(2, 0, 1)

    def mask(self, data: bytes) -> UInt8[np.ndarray, "size size"]:
        """Class ids of an encoded palette picture, nearest pixel, IGNORE where no class fits.

        Raises:
            images.BadImage: not a picture, or grey: then it is no palette picture.
        """
        image = images.open_image(data)
        if image.mode != "RGB":
            raise images.BadImage(
                f"mode {image.mode}, expected RGB (a map in the palette's colours)"
            )
        near = image.resize((self.size, self.size), Image.Resampling.NEAREST)
        return images.classes_of(np.asarray(near), self.num_classes)

    def normalise(self, tiles: Num[Tensor, "n 3 size size"]) -> Float[Tensor, "n 3 size size"]:
        """Values in [0, 255] to the network's input.

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


class Segmenter(nn.Module):
    """SegFormer and its `Preprocess`."""

    def __init__(self, net: SegformerForSemanticSegmentation, preprocess: Preprocess) -> None:
        super().__init__()
        self.net = net
        self.preprocess = preprocess

    @classmethod
    def from_base(cls, base: str, preprocess: Preprocess, flag: str = "--base") -> "Segmenter":
        """A pretrained SegFormer, by hub id or directory, to be fine-tuned.

        Its last layer is kept where its number of classes is right, and else made new.

        Raises:
            ValueError: the base is not there; says what to download and that `flag` takes it.
        """
        names = schema.LABELS[: preprocess.num_classes]
        labels: dict[str, Any] = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        with hub.located(base, flag) as safe:
            net = SegformerForSemanticSegmentation.from_pretrained(
                base, ignore_mismatched_sizes=True, dtype=torch.float32, **labels, **safe
            )
        return cls(net, preprocess)

    @classmethod
    def load(cls, location: str, device: torch.device | str = "cpu") -> "Segmenter":
        """A segmenter that `save` wrote, in eval mode.

        Raises:
            ValueError: no such directory, or no `preprocess.json` in it.
        """
        if not storage.exists(storage.join(location, FILE)):
            raise ValueError(
                f"{location}: expected a segmenter with {FILE}, as segment/train.py publishes it. "
                "A bare SegFormer has no preprocessing: train it first (--base takes it)."
            )
        preprocess = Preprocess.read(location)
        with hub.fetched(location) as directory, hub.located(directory, "--segment.model") as safe:
            net = SegformerForSemanticSegmentation.from_pretrained(
                directory, dtype=torch.float32, **safe
            )
        return cls(net, preprocess).to(device).eval()

    def save(self, directory: str) -> None:
        """Write weights (safetensors), config and preprocessing to a local directory."""
        self.net.save_pretrained(directory)
        storage.write_json(os.path.join(directory, FILE), dataclasses.asdict(self.preprocess))

    def logits(self, tiles: Num[Tensor, "n 3 size size"]) -> Float[Tensor, "n classes low low"]:
        """Scores of the classes at a quarter of the size, of tiles with values in [0, 255]."""
        return self.net(self.preprocess.normalise(tiles)).logits

    @torch.inference_mode()
    def predict(self, tiles: UInt8[Tensor, "n 3 size size"]) -> UInt8[Tensor, "n size size"]:
        """Most probable class id of each pixel."""
        return enlarge(self.logits(tiles), tiles.shape[-1]).argmax(dim=1).byte()


def enlarge(
    logits: Float[Tensor, "n classes low low"], size: int
) -> Float[Tensor, "n classes size size"]:
    """Logits at the resolution of the mask, bilinear, in float32."""
    return nn.functional.interpolate(logits.float(), size=(size, size), mode="bilinear")
