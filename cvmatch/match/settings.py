"""Settings of the matcher: its inputs, its losses, its training, and how rows are embedded."""

import dataclasses
from typing import Any, Literal

from cvmatch.runtime.settings import Pool
from cvmatch.training.settings import TrainConfig

Modality = Literal["G", "G+A", "G+A+S", "A"]
MODALITIES: tuple[Modality, ...] = ("G", "G+A", "G+A+S", "A")
"""What a query may consist of: zeros (or in a joint score learned nulls) stand in for the rest."""

Branch = Literal["direct", "aerial", "layout"]
"""What of a query meets what of a tile: G and C, A and C, A and C at low resolution."""

BRANCHES_OF: dict[Modality, tuple[Branch, ...]] = {
    "G": ("direct",),
    "G+A": ("direct", "aerial", "layout"),
    "G+A+S": ("direct", "aerial", "layout"),
    "A": ("aerial", "layout"),
}
"""Branches that know something of a query."""

Projection = Literal["polar", "square"]
Loss = Literal["infonce", "triplet"]
Head = Literal["residual", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatcherShape:
    """What the towers of a matcher see, and how wide its heads are."""

    score: Literal["sum", "joint"] = "sum"
    """sum: of the branches' cosines, weighted; each tile has a vector of its own. joint: the
    published form, one cosine of FFN_G([g; a; s]) and FFN_C([a; c]) with the query's own A."""
    branches: tuple[Branch, ...] = ("direct", "layout")
    """Cosines that are added: direct of G and C, aerial of A and C (its training takes half as
    long again), layout of A and C at low resolution, which is not trained."""
    shared: bool = False
    """One tower for G, A and C, as Sample4Geo has it."""
    projection: Projection = "polar"
    """What the towers of A, C and S see: the tile's polar view, of the panorama's height and width,
    or the square tile as it is."""
    panorama: tuple[int, int] = (128, 512)
    """Height and width of G, in pixels; the width a multiple of 4 (quarter turns)."""
    tile_size: int = 256
    """Height and width to which tiles are decoded, in pixels."""
    hidden: int = 256
    """Width of the heads, and of each learned embedding (2 bytes a number in an index)."""

    def __post_init__(self) -> None:
        if self.panorama[1] % 4:
            raise ValueError(
                "matcher: expected a panorama whose width is a multiple of 4 (quarter turns), got "
                f"{self.panorama}. Change --panorama."
            )
        if not self.branches or len(set(self.branches)) < len(self.branches):
            raise ValueError(f"matcher: expected each branch once, got {self.branches}.")
        if self.score == "sum" and self.branches == ("layout",):
            raise ValueError("matcher: branch layout has nothing to train: add direct or aerial.")

    @property
    def ground_only(self) -> bool:
        """Whether queries are of G alone, and A and S are not looked at."""
        return self.score == "sum" and self.branches == ("direct",)

    @property
    def letters(self) -> str:
        """Which pictures of a query are looked at."""
        return "GAS" if self.score == "joint" else "G" if self.ground_only else "GA"

    @property
    def tower_letters(self) -> str:
        """Which of these pass through a tower, so that a training needs them."""
        return "G" if self.score == "sum" and "aerial" not in self.branches else self.letters

    @property
    def shape(self) -> dict[str, Any]:
        """Return the fields of `MatcherShape` alone."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(MatcherShape)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatcherLossConfig:
    """What a matcher learns, and from which terms."""

    loss: Loss = "infonce"
    """infonce (learned temperature), or triplet over all negatives of the batch."""
    margin: float = 0.3
    """Margin of the triplet loss, in cosine distance (0 to 2)."""
    direct_weight: float = 2.0
    """Joint score: weight of the loss on G alone against the tiles' own embeddings, beside the
    loss on joint scores, where each query brings its own A to all tiles."""
    modality_dropout: tuple[float, float, float] = (0.1, 0.5, 0.5)
    """Joint score: shares of rows, in [0, 1], whose G, A and S are replaced by the learned null; G
    only in rows that keep their A."""
    augment: bool = True
    """Quarter turns and mirroring of whole pairs, and colours and blur of each picture."""
    fov: tuple[float, ...] = (360.0,)
    """Degrees of the panorama that are seen, in (0, 360]; below 360 in the panorama's middle. Of
    two numbers, `360 70`, each panorama keeps one part, in its place, of random width between them:
    the least width sinks from the first to the second in the first half of the epochs."""
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
        if not all(0 <= share <= 1 for share in self.modality_dropout):
            raise ValueError(
                "train-matcher: modality_dropout are shares in [0, 1], got "
                f"{self.modality_dropout}."
            )
        if not 0 < self.margin <= 2:
            raise ValueError(f"train-matcher: margin is in (0, 2], got {self.margin}.")
        if len(self.fov) not in (1, 2) or not all(0 < degrees <= 360 for degrees in self.fov):
            raise ValueError(
                f"train-matcher: fov is one number or two, in (0, 360] degrees, got {self.fov}."
            )
        if len(self.fov) == 2 and (self.fov[0] < self.fov[1] or self.unknown_heading):
            raise ValueError(
                "train-matcher: two fov go from a wide view to a narrow one whose headings are "
                f"known, got {self.fov} and unknown_heading {self.unknown_heading}. A search tries "
                "headings that are not known (--headings)."
            )
        if self.chunk < 0:
            raise ValueError(f"train-matcher: expected chunk of at least 0, got {self.chunk}.")
        if self.direct_weight < 0:
            raise ValueError(
                f"train-matcher: expected direct_weight of at least 0, got {self.direct_weight:g}."
            )

    @property
    def limits_view(self) -> bool:
        """Whether less is seen than the whole, aligned panorama."""
        return min(self.fov) < 360 or self.unknown_heading


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainMatcher(MatcherShape, MatcherLossConfig):
    """Train the matcher, which embeds queries and tiles, on synthesized pairs."""

    pairs: str = "data/synthesized/train"
    """URI of the rows that cvmatch synthesize wrote."""
    val: str = ""
    """URI of such rows for validation; empty: none."""
    tower: str = "vgg16"
    """Backbone of the towers: a torchvision model, timm:NAME, or a local tower directory."""
    weights: str = ""
    """Local .safetensors or .pth file of its weights, or a directory with one; empty: its own, or
    those of its hub."""
    grid: tuple[int, int] | None = None
    """Rows and columns of features that the head of a tower directory sees; None: its own."""
    hard_negatives_every: int = 0
    """Epochs from one search for near pairs, which then share batches, to the next: near in space
    before the first epoch, then near for the model. 0: batches at random."""
    output: str = "models/matcher"
    """Directory of the published model."""
    fit: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        MatcherShape.__post_init__(self)
        MatcherLossConfig.__post_init__(self)
        if self.limits_view and not self.ground_only:
            raise ValueError(
                "train-matcher: A and S are made from the whole, aligned panorama, so that limited "
                f"views need G alone: expected --branches direct with fov {self.fov} and "
                f"unknown_heading {self.unknown_heading}, got {self.branches}."
            )
        if self.hard_negatives_every < 0:
            raise ValueError(
                "train-matcher: expected hard_negatives_every >= 0, got "
                f"{self.hard_negatives_every}."
            )
        if self.hard_negatives_every and "://" in self.fit.storage:
            raise ValueError(
                "train-matcher: the search for near pairs loads the model of the last checkpoint: "
                "expected a fit.storage that all nodes mount with hard_negatives_every, got "
                f"{self.fit.storage!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed tiles or queries with a trained matcher."""

    model: str = "models/matcher"
    """Directory or URI that train-matcher published."""
    modality: Modality = "G+A+S"
    """What a query consists of. Tiles do not depend on it."""
    pool: Pool = dataclasses.field(default_factory=lambda: Pool(batch=32))
    """Actors."""
