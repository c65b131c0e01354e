"""Train the matcher: synthesized pairs -> a published model that names its training ids."""

import dataclasses
import functools
import hashlib
from typing import Any

import torch
from jaxtyping import Float
from ray.train import Result
from torch import Tensor, nn

from cvmatch import draws, metrics, storage, tracking, training
from cvmatch.match import loss as losses
from cvmatch.match.augment import Views, augmented
from cvmatch.match.model import JointFeatureLearningNet, MatcherConfig, View
from cvmatch.match.pairs import decode, pair_ids, synthesized
from cvmatch.towers import tower

IDS = "training_ids.txt"
"""File of a model directory that lists the pairs it was trained on, one id a line, sorted."""

_TRAINING = "training.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainMatcher:
    """Train the joint embedding on synthesized pairs."""

    pairs: str = "data/synthesized/train"
    """URI of the rows that jobs/synthesize.py wrote."""
    val: str = ""
    """URI of such rows for validation; empty: none."""
    tower: str = "vgg16"
    """Backbone of the three towers: a torchvision model, or a local tower directory."""
    weights: str = ""
    """Local .safetensors or .pth file of its weights; empty: its own, or torchvision's hub."""
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
    loss: losses.Loss = "triplet"
    """triplet (margin), soft-margin (SAFA) or infonce (learned temperature)."""
    negatives: losses.Negatives = "all"
    """Which negatives of the batch the triplet loss takes."""
    margin: float = 0.3
    """Margin of the triplet loss, in cosine distance (0 to 2)."""
    smoothing: float = 0.1
    """Label smoothing of infonce, in [0, 1)."""
    w_joint: float = 1.0
    """Weight of the loss on joint scores, where each query brings its own A to all tiles."""
    w_direct: float = 0.5
    """Weight of the same loss on G against the tiles' own embeddings (level G, the shortlist)."""
    drop_ground: float = 0.1
    """Share of rows whose G becomes the learned null; those keep their A."""
    drop_synthetic: float = 0.2
    """Share of rows whose A becomes the learned null."""
    drop_classes: float = 0.3
    """Share of rows whose S becomes the learned null."""
    augment: bool = True
    """Quarter turns and mirroring of whole pairs, and colour changes of each view."""
    lr_towers: float = 1e-4
    """Learning rate of the backbones."""
    lr_heads: float = 1e-3
    """Learning rate of fusion layers and nulls."""
    output: str = "models/matcher"
    """Directory of the published model."""
    fit: training.Fit = dataclasses.field(default_factory=training.Fit)
    """The training loop."""

    def __post_init__(self) -> None:
        drops = (self.drop_ground, self.drop_synthetic, self.drop_classes)
        if not all(0 <= drop <= 1 for drop in drops):
            raise ValueError(f"train_matcher: drop_* are shares in [0, 1], got {drops}.")
        if not 0 < self.margin <= 2:
            raise ValueError(f"train_matcher: margin is in (0, 2], got {self.margin}.")


class MatcherTask(nn.Module):
    """`ground`, `aerial`, `synthetic` (uint8, CHW), `classes` (ids, HW), `key` -> the loss."""

    def __init__(
        self, model: JointFeatureLearningNet, config: TrainMatcher, ids: tuple[str, ...] = ()
    ) -> None:
        """`ids` of the training pairs go into the model directory."""
        super().__init__()
        self.model, self.config, self.ids = model, config, ids
        # Only where it is used: DDP waits for the gradient of every parameter.
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log()) if _learned(config) else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss and its parts; in evaluation mode also the recall among the batch's own tiles."""
        joint, direct = self.scores(batch)
        parts = {"joint": self._loss(joint), "direct": self._loss(direct)}
        total = self.config.w_joint * parts["joint"] + self.config.w_direct * parts["direct"]
        named = {"loss": total} | {name: value.detach() for name, value in parts.items()}
        if self.training:
            return named
        return named | {"recall_at_1": _first(joint), "recall_at_1_direct": _first(direct)}

    def scores(
        self, batch: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "all all"], Float[Tensor, "all all"]]:
        """Joint and direct scores of all queries (rows) and all tiles (columns) of all workers.

        Every tile of a row is embedded with that query's own A. With a tile's own A, A would tell
        the pair without a look at the tile, and a loss near zero would mean nothing.
        """
        views = self._views(batch)
        model = self.model
        ground, classes = model.ground_features(views.ground), model.class_features(views.classes)
        pictures = torch.cat([views.synthetic, views.aerial])
        synthetic, tile = model.aerial_features(pictures).chunk(2)
        query = model.fuse(*self._dropped(ground, synthetic, classes, batch))
        alone = model.fuse(ground, None, None)
        u = model.candidate_tile(tile)
        # In validation, workers see different numbers of batches, so nothing can be gathered.
        gathered = losses.gathered if self.training else torch.nn.Identity()
        joint = model.pair_scores(query, gathered(u.float()))
        own = gathered(model.shortlist(u).float())
        with torch.autocast(u.device.type, enabled=False):  # bf16 has ties: 8 bits of a cosine
            direct = alone.embedding.float() @ own.T
        return gathered(joint), gathered(direct)

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate: backbones, and what starts from random weights."""
        towers = [weight for name, weight in self.named_parameters() if "_tower." in name]
        heads = [weight for name, weight in self.named_parameters() if "_tower." not in name]
        return [
            {"params": towers, "lr": self.config.lr_towers},
            {"params": heads, "lr": self.config.lr_heads},
        ]

    def save(self, directory: str) -> None:
        """Write the directory that `JointFeatureLearningNet.load` and `training_ids` read."""
        self.model.save(directory)
        text = "".join(f"{pair_id}\n" for pair_id in self.ids)
        storage.write_text(storage.join(directory, IDS), text)
        about = {"pairs": len(self.ids), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        storage.write_json(storage.join(directory, _TRAINING), about)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Validation means."""
        return {name: float(value) for name, value in means.items()}

    def _views(self, batch: dict[str, Tensor]) -> Views:
        views = Views(
            batch["ground"].float() / 255,
            batch["aerial"].float() / 255,
            batch["synthetic"].float() / 255,
            batch["classes"],
        )
        if not self.training or not self.config.augment:
            return views
        return augmented(views, batch["key"], self.config.fit.seed, int(batch["epoch"]))

    def _dropped(
        self, ground: Tensor, synthetic: Tensor, classes: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tower features with the learned null in some rows, never of both G and A."""
        if not self.training:
            return ground, synthetic, classes

        def falls(share: float, purpose: str) -> Tensor:
            stream = draws.stream(self.config.fit.seed, int(batch["epoch"]), purpose)
            return (draws.uniform(batch["key"], stream) < share)[:, None]

        no_a = falls(self.config.drop_synthetic, "drop synthetic")
        no_g = falls(self.config.drop_ground, "drop ground") & ~no_a
        no_s = falls(self.config.drop_classes, "drop classes")
        return (
            torch.where(no_g, self.model.null_ground, ground),
            torch.where(no_a, self.model.null_synthetic, synthetic),
            torch.where(no_s, self.model.null_classes, classes),
        )

    def _loss(self, score: Tensor) -> Tensor:
        config = self.config
        if config.loss == "triplet":
            return losses.triplet(score, config.margin, config.negatives)
        if self.log_scale is None:
            return losses.soft_margin(score)
        return losses.info_nce(score, self.log_scale.exp().clamp(max=100.0), config.smoothing)


def train(config: TrainMatcher) -> Result:
    """Train, publish the model to `config.output`, and log a run.

    Raises:
        FileNotFoundError: no synthesized rows there.
        ValueError: a backbone is not there, no row is without error, or validation pairs are
            among the training pairs.
    """
    sizes = {"panorama": config.panorama, "square": config.square}
    data = decode(synthesized(config.pairs), **sizes)
    val = decode(synthesized(config.val), **sizes) if config.val else None
    ids = pair_ids(config.pairs)
    if config.val and (both := set(ids).intersection(pair_ids(config.val))):
        raise ValueError(
            f"train_matcher: expected validation pairs apart from training, got {len(both)} "
            f"in both {config.pairs} and {config.val}, such as {min(both)}. Pass another --val."
        )
    with tracking.start("match", config) as run:
        result = training.fit(
            functools.partial(build_task, config, ids), data, val, config.fit, run
        )
        training.publish(result, config.output)
    return result


def build_task(config: TrainMatcher, ids: tuple[str, ...] = ()) -> MatcherTask:
    """The task on its base towers."""
    ground, aerial, classes = (tower(config.tower, config.weights) for _ in range(3))
    model_config = MatcherConfig(
        ground=ground.spec,
        aerial=aerial.spec,
        classes=classes.spec,
        view=config.view,
        panorama=config.panorama,
        polar=config.polar,
        square=config.square,
        hidden=config.hidden,
    )
    model = JointFeatureLearningNet(model_config, (ground, aerial, classes))
    return MatcherTask(model, config, ids)


def training_ids(directory: str) -> frozenset[str]:
    """Ids of the pairs that the model in `directory` was trained on: an evaluation refuses these.

    Raises:
        ValueError: the list is absent, or not the one that was written with the model.
    """
    location = storage.join(directory, IDS)
    if not storage.exists(location):
        raise ValueError(f"{directory}: expected {IDS}, which train_matcher writes, found none.")
    text = storage.read_text(location)
    expected = storage.read_json(storage.join(directory, _TRAINING))["sha256"]
    if hashlib.sha256(text.encode()).hexdigest() != expected:
        raise ValueError(f"{location} is not the list that its {_TRAINING} was written with.")
    return frozenset(text.split("\n")[:-1])


def _learned(config: TrainMatcher) -> bool:
    return config.loss == "infonce"


def _first(score: Tensor) -> Tensor:
    truth = torch.arange(len(score), device=score.device)
    return (metrics.ranks(score, truth) == 0).float().mean()
