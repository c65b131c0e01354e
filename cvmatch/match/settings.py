"""Settings of the matcher: its training, its losses, and how rows are embedded."""

import dataclasses
from typing import Literal

from cvmatch.runtime.settings import Pool
from cvmatch.training.settings import Fit

Modality = Literal["G", "G+A", "G+A+S", "A"]
MODALITIES: tuple[Modality, ...] = ("G", "G+A", "G+A+S", "A")
"""What a query may consist of; learned nulls stand in for the rest."""

View = Literal["polar", "square"]
Loss = Literal["triplet", "soft-margin", "infonce"]
Negatives = Literal["all", "hardest", "semi-hard"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatcherLossConfig:
    """What a matcher learns, and from which terms."""

    loss: Loss = "infonce"
    """triplet (margin), soft-margin (SAFA) or infonce (learned temperature)."""
    negatives: Negatives = "all"
    """Which negatives of the batch the triplet loss takes."""
    margin: float = 0.3
    """Margin of the triplet loss, in cosine distance (0 to 2)."""
    smoothing: float = 0.1
    """Label smoothing of infonce, in [0, 1)."""
    w_joint: float = 0.5
    """Weight of the loss on joint scores, where each query brings its own A to all tiles; 0: only G
    meets C, and no tower looks at A or S."""
    w_direct: float = 1.0
    """Weight of the same loss on G alone against the tiles' own embeddings (the shortlist)."""
    drop_ground: float = 0.1
    """Share, of the rows that keep their A, whose G becomes the learned null: with drop_synthetic
    0.5 half as many of all rows, with 1 none."""
    drop_synthetic: float = 0.5
    """Share of rows whose A becomes the learned null."""
    drop_classes: float = 0.5
    """Share of rows whose S becomes the learned null."""
    augment: bool = True
    """Quarter turns and mirroring of whole pairs, and colours and blur of each view."""
    fov: float = 360.0
    """Degrees of the panorama that are seen, in (0, 360]; below 360 in the panorama's middle."""
    unknown_heading: bool = False
    """Turn each panorama by a random angle that the model is not told."""
    chunk: int = 0
    """Pictures that a tower sees at a time; their activations are computed again in the backward
    pass, so that a batch of any size fits in the memory of a chunk. 0: all, and kept."""
    lr_towers: float = 1e-4
    """Learning rate of the backbones."""
    lr_heads: float = 1e-3
    """Learning rate of fusion layers and nulls."""

    def __post_init__(self) -> None:
        drops = (self.drop_ground, self.drop_synthetic, self.drop_classes)
        if not all(0 <= drop <= 1 for drop in drops):
            raise ValueError(f"train_matcher: drop_* are shares in [0, 1], got {drops}.")
        if not 0 < self.margin <= 2:
            raise ValueError(f"train_matcher: margin is in (0, 2], got {self.margin}.")
        if not 0 < self.fov <= 360:
            raise ValueError(f"train_matcher: fov is in (0, 360] degrees, got {self.fov}.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"train_matcher: smoothing is in [0, 1), got {self.smoothing}.")
        if self.chunk < 0:
            raise ValueError(f"train_matcher: expected chunk of at least 0, got {self.chunk}.")
        weights = (self.w_joint, self.w_direct)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "train_matcher: expected w_joint and w_direct of at least 0, one of them above, "
                f"got {self.w_joint:g} and {self.w_direct:g}."
            )
        if self.limited and self.joint:
            raise ValueError(
                "train_matcher: A and S are made from the whole, aligned panorama, so that limited "
                f"views need G alone: expected w_joint 0 with fov {self.fov:g} and "
                f"unknown_heading {self.unknown_heading}, got {self.w_joint:g}."
            )

    @property
    def joint(self) -> bool:
        """Whether A and S are looked at."""
        return self.w_joint > 0

    @property
    def limited(self) -> bool:
        """Whether less is seen than the whole, aligned panorama."""
        return self.fov < 360 or self.unknown_heading


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainMatcher(MatcherLossConfig):
    """Train the joint embedding on synthesized pairs."""

    pairs: str = "data/synthesized/train"
    """URI of the rows that jobs/synthesize.py wrote."""
    val: str = ""
    """URI of such rows for validation; empty: none."""
    tower: str = "vgg16"
    """Backbone of the towers: a torchvision model, or a local tower directory."""
    weights: str = ""
    """Local .safetensors or .pth file of its weights; empty: its own, or torchvision's hub."""
    grid: tuple[int, int] | None = None
    """Rows and columns of features that the head of a tower directory sees; None: its own."""
    dim: int | None = None
    """Width of that head; None: its own."""
    shared: bool = False
    """One tower for G, A and C, as Sample4Geo has it."""
    view: View = "polar"
    """What the towers of A, C and S see: the tile's polar view, or the tile as it is."""
    panorama: tuple[int, int] = (128, 512)
    """Height and width of G, in pixels."""
    polar: tuple[int, int] = (128, 512)
    """Height and width of the polar view, in pixels."""
    square: int = 256
    """Side to which tiles are decoded, in pixels."""
    hidden: int = 256
    """Width of the fusion layers, of the embeddings, and of the vector stored for each tile."""
    mine_every: int = 0
    """Epochs from one search for near pairs, which then share batches, to the next: near in space
    before the first epoch, then near for the model. 0: batches at random."""
    mine_pool: Pool = dataclasses.field(default_factory=lambda: Pool(batch=32))
    """Actors that embed the training pairs for that search."""
    output: str = "models/matcher"
    """Directory of the published model."""
    fit: Fit = dataclasses.field(default_factory=Fit)
    """The training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mine_every < 0:
            raise ValueError(f"train_matcher: expected mine_every >= 0, got {self.mine_every}.")
        if self.mine_every and "://" in self.fit.storage:
            raise ValueError(
                "train_matcher: the search for near pairs loads the model of the last checkpoint: "
                f"expected a fit.storage that all nodes mount with mine_every, got "
                f"{self.fit.storage!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed tiles or queries with a trained matcher."""

    model: str = "models/matcher"
    """Local directory that train_matcher published."""
    modality: Modality = "G+A+S"
    """What a query consists of; learned nulls stand in for the rest. Tiles do not depend on it."""
    pool: Pool = dataclasses.field(default_factory=lambda: Pool(batch=32))
    """Actors."""
