"""SegFormer with its preprocessing: encoded pictures in, maps of class ids out.

`Preprocess` is the only way from bytes to the network, for training and for inference, and is saved
beside the weights: a segmenter cannot be run at another size or normalisation than it was trained.
"""

import dataclasses
import os
from typing import Any

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation

from cvmatch.data import schema, storage
from cvmatch.nn import hub
from cvmatch.segment.batches import FILE, Preprocess

BASES = {
    f"b{number}": f"nvidia/segformer-b{number}-finetuned-ade-{side}-{side}"
    for number, side in enumerate((512, 512, 512, 512, 512, 640))
}
"""Short names of the published SegFormers of 150 classes (ADE20K), and their hub ids."""


class Segmenter(nn.Module):
    """SegFormer and its `Preprocess`."""

    def __init__(self, net: SegformerForSemanticSegmentation, preprocess: Preprocess) -> None:
        super().__init__()
        self.net = net
        self.preprocess = preprocess

    @classmethod
    def from_base(cls, base: str, preprocess: Preprocess, flag: str = "--base") -> "Segmenter":
        """Load a pretrained SegFormer to fine-tune, by short name (`BASES`), hub id or directory.

        Its last layer is kept where its number of classes is right, and else made new.

        Raises:
            ValueError: the base is not there, or its weights do not fit; says what to download and
                that `flag` takes it.
        """
        return cls(_load_base(BASES.get(base, base), preprocess, flag), preprocess)

    @classmethod
    def load(cls, location: str, device: torch.device | str = "cpu") -> "Segmenter":
        """Load a segmenter that `save` wrote, in eval mode.

        Raises:
            ValueError: no such directory, or no `preprocess.json` in it.
        """
        directory = storage.local_directory(location)
        if not storage.exists(storage.join(directory, FILE)):
            raise ValueError(
                f"segmenter {storage.describe_local(location)}: expected a segmenter with {FILE}, "
                "as cvmatch train-segmenter publishes it. A bare SegFormer has no preprocessing: "
                "train it first (--base takes it). Of a cluster, each node has to see it: pass a "
                "directory that all mount, or a URI (s3://...)."
            )
        preprocess = Preprocess.read(directory)
        net = hub.load(
            SegformerForSemanticSegmentation, directory, "--segment.model", dtype=torch.float32
        )
        return cls(net, preprocess).to(device).eval()

    def save(self, directory: str) -> None:
        """Write weights (safetensors), config and preprocessing to a local directory."""
        self.net.save_pretrained(directory)
        storage.write_json(os.path.join(directory, FILE), dataclasses.asdict(self.preprocess))

    def logits(self, tiles: Num[Tensor, "n 3 size size"]) -> Float[Tensor, "n classes low low"]:
        """Score the classes at a quarter of the size, of tiles with values in [0, 255]."""
        return self.net(self.preprocess.normalise(tiles)).logits

    def scores(
        self, tiles: Num[Tensor, "n 3 size size"], *, flip: bool = False
    ) -> Float[Tensor, "n classes size size"]:
        """Return logits at the tiles' resolution; with `flip`, the mean over tile and mirror."""
        logits = self.logits(tiles)
        if flip:
            logits = (logits + self.logits(tiles.flip(-1)).flip(-1)) / 2
        return upsample(logits, tiles.shape[-1])

    @torch.inference_mode()
    def predict(
        self, tiles: UInt8[Tensor, "n 3 size size"], *, flip: bool = False
    ) -> UInt8[Tensor, "n size size"]:
        """Return the most probable class id of each pixel, of tiles of the size of training."""
        return self.scores(tiles, flip=flip).argmax(dim=1).byte()


def check_base(base: str, preprocess: Preprocess, flag: str = "--base") -> None:
    """Check that a base can be had; of a local one also that its weights fit, which are not loaded.

    Raises:
        ValueError: as `Segmenter.from_base`.
    """
    base = BASES.get(base, base)
    hub.check_model(base, flag)
    if os.path.isdir(base):
        _load_base(base, preprocess, flag, device_map="meta")


def _load_base(
    base: str, preprocess: Preprocess, flag: str, **options: Any
) -> SegformerForSemanticSegmentation:
    names = schema.LABELS[: preprocess.num_classes]
    return hub.load(
        SegformerForSemanticSegmentation,
        base,
        flag,
        # A base of the encoder alone lacks all of the head; of another one, the classes differ.
        heads=("decode_head.", "decode_head.classifier."),
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **options,
    )


def upsample(
    logits: Float[Tensor, "n classes low low"], size: int
) -> Float[Tensor, "n classes size size"]:
    """Enlarge logits to the resolution of the mask, bilinear, in float32."""
    return nn.functional.interpolate(logits.float(), size=(size, size), mode="bilinear")
