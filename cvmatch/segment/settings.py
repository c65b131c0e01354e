"""Settings of the segmenter: its training, and how rows are segmented."""

from dataclasses import dataclass, field
from typing import Literal

from cvmatch.data.settings import Ingest, Validation, check_disjoint
from cvmatch.runtime.settings import Pool
from cvmatch.training.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainSegmenter:
    """Fine-tune a segmenter; the defaults are the reference run."""

    data: Ingest = field(default_factory=Ingest)
    """Rows to train on; those without a class map are left out."""
    val: Validation | None = None
    """Rows to validate on; None: with the schedule plateau the split `val` of `data`, else none."""
    synthesized: str = ""
    """URI of rows that cvmatch synthesize wrote for this split: their synthetic aerials, with the
    true tiles' maps, are trained on too; empty: none."""
    synthesized_share: float = 1.0
    """Share of those rows that is added, in (0, 1]."""
    base: str = "b3"
    """Pretrained SegFormer: b0 to b5 (of ADE20K, from the hub), a hub id, or a local directory."""
    size: int = 512
    """Height and width of the pictures and masks in training and inference, in pixels."""
    num_classes: int = 5
    """5 (cars are ignored) or 6."""
    lr: float = 6e-5
    """Learning rate of the encoder."""
    lr_head: float = 6e-4
    """Learning rate of the decode head, whose last layer is new."""
    class_weights: bool = False
    """Weigh rare classes more, by 1 / ln(1.02 + share of pixels)."""
    dice_weight: float = 0.0
    """Weight of the Dice loss beside cross entropy."""
    augment: bool = True
    """Quarter turns, mirrors and colour jitter."""
    output: str = "models/segmenter"
    """Directory of the published model."""
    fit: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=60, batch=6, schedule="plateau")
    )
    """The training loop."""

    def __post_init__(self) -> None:
        check_disjoint(self.data, self.held_out)
        if not 0 < self.synthesized_share <= 1:
            raise ValueError(
                "train-segmenter: synthesized_share is a share in (0, 1], got "
                f"{self.synthesized_share}. For none, leave out --synthesized."
            )

    @property
    def held_out(self) -> Validation | None:
        """The rows to validate on."""
        if self.val is None and self.fit.schedule == "plateau":
            return Validation(root=self.data.root, limit=self.data.limit)
        return self.val


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment the aerial pictures of rows."""

    model: str = "models/segmenter"
    """Directory or URI that train-segmenter published."""
    source: Literal["synthetic", "aerial"] = "synthetic"
    """Column of the pictures: the generated ones, or the true ones."""
    flip: bool = False
    """Average the logits with those of the mirrored picture, at twice the cost."""
    pool: Pool = field(default_factory=Pool)
    """Actors that hold the model."""
