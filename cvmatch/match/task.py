"""The matcher's training step: a batch of pairs -> losses of all its queries and tiles."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvmatch.data import storage
from cvmatch.match import losses, validation
from cvmatch.match.augment import TowerInputs, augment, crop_fov
from cvmatch.match.heads.branches import BranchHeads, Features, FusionWeights
from cvmatch.match.heads.joint import JointHeads
from cvmatch.match.model import Matcher
from cvmatch.match.settings import MatcherLossConfig
from cvmatch.nn import rng
from cvmatch.nn.geometry import see_part
from cvmatch.training.metrics import ROW_KEY, ROWS
from cvmatch.training.task import VALIDATION_BATCH, ParameterGroup

IDS = "training_ids.txt"
"""File of a model directory that lists the pairs it was trained on, one id a line, sorted."""

SMOOTHING = 0.1
"""Label smoothing of InfoNCE, as Sample4Geo's (Deuser et al. 2023)."""

LOSS_ROWS = 32
"""Rows of a validation, in the order of their keys, that a loss compares with each other."""

LAYOUT_SCALE = 5.0
"""Inverse temperature of layouts, which are not trained, before weights are fitted."""

_TRAINING = "training.json"


class MatcherTask(nn.Module):
    """`ground`, `aerial`, `synthetic` (uint8, CHW), `synthetic_mask` (ids, HW), `key` -> the loss.

    Those are needed that the model's `tower_letters` name.

    Args:
        model: The matcher.
        config: What it learns.
        ids: Ids of the training pairs, which go into the model directory.
        seed: Seed of augmentation and dropout of modalities.
        epochs: Epochs of the training, in which views become narrow.
    """

    def __init__(
        self,
        model: Matcher,
        config: MatcherLossConfig,
        ids: tuple[str, ...] = (),
        seed: int = 0,
        epochs: int = 1,
    ) -> None:
        super().__init__()
        self.model, self.config, self.ids = model, config, ids
        self.seed, self.epochs = seed, epochs
        terms = ("",) if isinstance(model.heads, JointHeads) else tuple(model.heads.query)
        # Only where they are used: DDP waits for the gradient of every parameter.
        terms = terms if config.loss == "infonce" else ()
        start = torch.tensor(1 / 0.07).log()
        self.log_scale = nn.ParameterDict({f"scale{t}": nn.Parameter(start.clone()) for t in terms})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and its terms; in evaluation mode the vectors of the rows, for `summary`.

        There the networks always see VALIDATION_BATCH rows, since the last bits of a vector depend
        on their number, and the gallery is that of all validation rows.
        """
        if self.training:
            return self._losses(self.scores(batch))
        count = len(batch["key"])
        inputs = self._inputs(validation.pad(batch, VALIDATION_BATCH), self.model.config.letters)
        vectors = validation.embed(self.model, inputs)
        rows = {f"{ROWS}{name}": value[:count] for name, value in vectors.items()}
        return rows | {ROW_KEY: batch["key"]}

    def scores(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, "all all"]]:
        """Score all queries (rows) and tiles (columns) of all workers, by each learned branch.

        A joint score has two, `direct` and `joint`. There every tile of a row is embedded with that
        query's own A. With a tile's own A, A would tell the pair without a look at the tile, and a
        loss near zero would mean nothing.
        """
        inputs = self._inputs(batch, self.model.config.tower_letters)
        model = self.model
        ground = self._features(model.ground_features, inputs.ground)
        pictures = [picture for picture in (inputs.aerial, inputs.synthetic) if picture is not None]
        tile, *synthetic = self._features(model.aerial_features, torch.cat(pictures)).split(
            len(ground)
        )
        if isinstance(model.heads, BranchHeads):
            queries = model.heads.query_parts(Features(ground, *synthetic))
            tiles = model.heads.tile_parts(Features(aerial=tile))
            return {name: self._products(queries[name], tiles[name]) for name in tiles}
        assert inputs.synthetic_mask is not None
        mask = self._features(model.mask_features, inputs.synthetic_mask)
        tile_proj = model.heads.tile_linear(tile)
        direct = model.heads.fuse(ground, None, None).embedding
        query = model.heads.fuse(
            *self._drop_modalities(model.heads, (ground, synthetic[0], mask), batch)
        )
        gathered = self._gather(tile_proj.float())
        return {
            "direct": self._products(direct, model.heads.shortlist_embedding(tile_proj)),
            "joint": self._gather(model.heads.pair_scores(query, gathered)),
        }

    def fusion_weights(self) -> FusionWeights:
        """Return weights in the proportion of the learned inverse temperatures.

        A sum of the branches' logits is the logarithm of a product of what each believes. They are
        a start; `train.fit_fusion` fits weights on pairs.
        """
        assert isinstance(self.model.heads, BranchHeads)
        scales = {
            name: float(self._scale(name).detach())
            if name in self.model.heads.query
            else LAYOUT_SCALE
            for name in self.model.heads.branches
        }
        return FusionWeights.normalised(scales)

    def groups(self) -> list[ParameterGroup]:
        """Return the parameters by learning rate: backbones, and what starts at random."""
        towers = [weight for name, weight in self.named_parameters() if "_tower." in name]
        heads = [weight for name, weight in self.named_parameters() if "_tower." not in name]
        return [
            {"params": towers, "lr": self.config.lr_towers},
            {"params": heads, "lr": self.config.lr_heads},
        ]

    def save(self, directory: str) -> None:
        """Write the directory that `Matcher.load` and `read_training_ids` read."""
        if isinstance(self.model.heads, BranchHeads):
            self.model.heads.weights = self.fusion_weights()
        self.model.save(directory)
        write_training_ids(directory, self.ids)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Return the ranks' numbers in the gallery of all rows (`validation.rank`), and the loss.

        The loss is a mean over LOSS_ROWS rows at a time.
        """
        rows = {
            name.removeprefix(ROWS): value.to(self.model.device)
            for name, value in means.items()
            if name.startswith(ROWS)
        }
        pairs = validation.EmbeddedPairs(self.model.heads, rows)
        totals: dict[str, float] = {}
        for begin in range(0, len(pairs), LOSS_ROWS):
            block = slice(begin, begin + LOSS_ROWS)
            scores = {name: pairs.scores(name, block, block) for name in self._learned()}
            share = min(LOSS_ROWS, len(pairs) - begin) / len(pairs)
            for name, value in self._losses(scores).items():
                totals[name] = totals.get(name, 0.0) + share * value.item()
        return totals | validation.rank(pairs)

    def _learned(self) -> tuple[str, ...]:
        """Return the scores that have a loss."""
        heads = self.model.heads
        return ("direct", "joint") if isinstance(heads, JointHeads) else tuple(heads.query)

    def _losses(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss, and its terms by branch."""
        terms = {name: self._loss(name, score) for name, score in scores.items()}
        weights = {"direct": self.config.direct_weight, "joint": 1.0}
        joint = isinstance(self.model.heads, JointHeads)
        total = torch.stack(
            [weights[name] * value if joint else value for name, value in terms.items()]
        ).sum()
        return {"loss": total} | {name: value.detach() for name, value in terms.items()}

    def _inputs(self, batch: dict[str, Tensor], letters: str) -> TowerInputs:
        """Return the pictures of `letters`; a validation sees the same in every epoch."""
        inputs = TowerInputs(
            batch["ground"].float() / 255,
            batch["aerial"].float() / 255,
            batch["synthetic"].float() / 255 if "A" in letters else None,
            batch["synthetic_mask"] if "S" in letters else None,
        )
        epoch = int(batch["epoch"])
        if self.training and self.config.augment:
            inputs = augment(inputs, batch["key"], self.seed, epoch)
        if not self.config.limits_view:
            return inputs
        heading = 360 * rng.uniform(batch["key"], rng.fold_in(self.seed, epoch, "heading"))
        fov, mean = self.config.fov, self.model.ground_mean
        if len(fov) == 1:
            heading = heading * self.config.unknown_heading
            return inputs._replace(ground=crop_fov(inputs.ground, fov[0], heading, mean))
        share = rng.uniform(batch["key"], rng.fold_in(self.seed, epoch, "fov"))
        degrees = fov[0] + share * (self._narrowest(epoch) - fov[0])
        seen = see_part(inputs.ground, degrees, heading, torch.tensor(mean))
        return inputs._replace(ground=seen)

    def _narrowest(self, epoch: int) -> float:
        """Return the narrowest view of an epoch, in degrees; of a validation, that of the end."""
        wide, narrow = self.config.fov
        done = min(1.0, 2 * epoch / max(1, self.epochs - 1)) if self.training else 1.0
        return wide + done * (narrow - wide)

    def _features(self, tower: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        """Return features of pictures, `chunk` at a time.

        The loss sees all rows at once, so its gradient is exact: the method of GradCache (Gao et
        al. 2021), by recomputation. Batch normalisation sees a chunk alone, and counts it twice.
        """
        chunk = self.config.chunk
        if not (chunk and self.training):
            return tower(pictures)
        chunks = pictures.split(chunk)
        return torch.cat([checkpoint(tower, some, use_reentrant=False) for some in chunks])

    def _drop_modalities(
        self, heads: JointHeads, features: tuple[Tensor, Tensor, Tensor], batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the learned null in the place of some rows' g, a or s, never of both g and a."""
        if not self.training:
            return features
        ground, synthetic, mask = features

        def drops(share: float, purpose: str) -> Tensor:
            stream = rng.fold_in(self.seed, int(batch["epoch"]), purpose)
            return (rng.uniform(batch["key"], stream) < share)[:, None]

        ground_share, synthetic_share, mask_share = self.config.modality_dropout
        no_a = drops(synthetic_share, "drop synthetic")
        no_g = drops(ground_share, "drop ground") & ~no_a
        no_s = drops(mask_share, "drop classes")
        return (
            torch.where(no_g, heads.null_ground, ground),
            torch.where(no_a, heads.null_synthetic, synthetic),
            torch.where(no_s, heads.null_mask, mask),
        )

    def _gather(self, local: Tensor) -> Tensor:
        """Concatenate all workers' rows; in validation, where workers have other counts, none."""
        return losses.all_gather(local) if self.training else local

    def _products(self, query: Tensor, tile: Tensor) -> Float[Tensor, "all all"]:
        query, tile = self._gather(query.float()), self._gather(tile.float())
        with torch.autocast(tile.device.type, enabled=False):  # bf16 has ties: 8 bits of a cosine
            return query @ tile.T

    def _scale(self, name: str) -> Tensor:
        """Return the inverse temperature of a branch (or of both terms of a joint score)."""
        for key in (f"scale{name}", "scale"):
            if key in self.log_scale:
                return self.log_scale[key].exp().clamp(max=100.0)
        return torch.tensor(1.0)

    def _loss(self, name: str, score: Tensor) -> Tensor:
        if self.config.loss == "triplet":
            return losses.triplet(score, self.config.margin)
        return losses.info_nce(score, self._scale(name), SMOOTHING)


def write_training_ids(directory: str, ids: Sequence[str], data: str = "") -> None:
    """Write the ids of the pairs that a model was trained on, which an evaluation refuses.

    `data`: name of the data set and its split; empty: there is none.
    """
    text = "".join(f"{pair_id}\n" for pair_id in ids)
    storage.write_text(storage.join(directory, IDS), text)
    about = {"pairs": len(ids), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    storage.write_json(storage.join(directory, _TRAINING), about | ({"data": data} if data else {}))


def write_training_data(directory: str, data: str) -> None:
    """Write the name of what a model was trained on, where the ids of its pairs are not known."""
    storage.write_json(storage.join(directory, _TRAINING), {"data": data})


def read_training(directory: str) -> dict[str, Any]:
    """Read what is known of a model's training: `data`, `pairs` and `sha256` of their ids."""
    location = storage.join(directory, _TRAINING)
    return storage.read_json(location) if storage.exists(location) else {}


def read_training_ids(directory: str) -> frozenset[str]:
    """Read the ids of the pairs that a model was trained on, which an evaluation refuses.

    Raises:
        ValueError: the list is absent, or not the one that was written with the model.
    """
    location = storage.join(directory, IDS)
    if not storage.exists(location):
        raise ValueError(
            f"{directory}: expected {IDS}, which train-matcher writes, found none. "
            "Train the matcher again."
        )
    text = storage.read_text(location)
    expected = storage.read_json(storage.join(directory, _TRAINING))["sha256"]
    if hashlib.sha256(text.encode()).hexdigest() != expected:
        raise ValueError(
            f"{location} is not the list that its {_TRAINING} was written with. "
            "Copy the model directory again."
        )
    return frozenset(text.split("\n")[:-1])
