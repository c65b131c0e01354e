"""The matcher's training step: a batch of pairs -> losses of all its queries and tiles."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvmatch.data import storage
from cvmatch.match import losses
from cvmatch.match.augment import TowerInputs, augment, crop_fov
from cvmatch.match.model import Matcher
from cvmatch.match.settings import MatcherLossConfig
from cvmatch.nn import metrics, rng

IDS = "training_ids.txt"
"""File of a model directory that lists the pairs it was trained on, one id a line, sorted."""

SMOOTHING = 0.1
"""Label smoothing of InfoNCE, as Sample4Geo's (Deuser et al. 2023)."""

_TRAINING = "training.json"


class MatcherTask(nn.Module):
    """`ground`, `aerial`, `synthetic` (uint8, CHW), `synthetic_mask` (ids, HW), `key` -> the loss.

    Where `joint_weight` is 0, `synthetic` and `synthetic_mask` need not be there.

    Args:
        model: The matcher.
        config: What it learns.
        ids: Ids of the training pairs, which go into the model directory.
        seed: Seed of augmentation and dropout of modalities.
    """

    def __init__(
        self, model: Matcher, config: MatcherLossConfig, ids: tuple[str, ...] = (), seed: int = 0
    ) -> None:
        super().__init__()
        self.model, self.config, self.ids, self.seed = model, config, ids, seed
        # Only where it is used: DDP waits for the gradient of every parameter.
        learned = config.loss == "infonce"
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log()) if learned else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and its terms; in evaluation mode also the recall within the batch.

        A batch is a small gallery: that recall compares epochs and trials. `evaluate` measures the
        whole one.
        """
        scores = self.scores(batch)
        terms = {name: self._loss(score) for name, score in scores.items()}
        weights = {"joint": self.config.joint_weight, "direct": self.config.direct_weight}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        values = {"loss": total} | {name: value.detach() for name, value in terms.items()}
        if self.training:
            return values
        recalls = {f"batch_recall_at_1_{name}": _recall_at_1(s) for name, s in scores.items()}
        # Of the fullest queries there are: what trials and epochs are compared by.
        best = recalls[f"batch_recall_at_1_{'joint' if 'joint' in scores else 'direct'}"]
        return values | recalls | {"batch_recall_at_1": best}

    def scores(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, "all all"]]:
        """Score all queries (rows) and tiles (columns) of all workers: `direct`, and `joint`.

        Every tile of a row is embedded with that query's own A. With a tile's own A, A would tell
        the pair without a look at the tile, and a loss near zero would mean nothing.
        """
        inputs = self._inputs(batch)
        model = self.model
        ground = self._features(model.ground_features, inputs.ground)
        pictures = [picture for picture in (inputs.aerial, inputs.synthetic) if picture is not None]
        tile, *synthetic = self._features(model.aerial_features, torch.cat(pictures)).split(
            len(ground)
        )
        # In validation, workers see different numbers of batches, so nothing can be gathered.
        gather = losses.all_gather if self.training else nn.Identity()
        tile_proj = model.tile_linear(tile)
        ground_only = model.fuse(ground, None, None)
        tiles = gather(model.shortlist_embedding(tile_proj).float())
        with torch.autocast(tiles.device.type, enabled=False):  # bf16 has ties: 8 bits of a cosine
            scores = {"direct": gather(ground_only.embedding.float() @ tiles.T)}
        if inputs.synthetic_mask is not None:
            mask = self._features(model.mask_features, inputs.synthetic_mask)
            query = model.fuse(*self._drop_modalities(ground, synthetic[0], mask, batch))
            scores["joint"] = gather(model.pair_scores(query, gather(tile_proj.float())))
        return scores

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by learning rate: backbones, and what starts at random."""
        towers = [weight for name, weight in self.named_parameters() if "_tower." in name]
        heads = [weight for name, weight in self.named_parameters() if "_tower." not in name]
        return [
            {"params": towers, "lr": self.config.lr_towers},
            {"params": heads, "lr": self.config.lr_heads},
        ]

    def save(self, directory: str) -> None:
        """Write the directory that `Matcher.load` and `read_training_ids` read."""
        self.model.save(directory)
        text = "".join(f"{pair_id}\n" for pair_id in self.ids)
        storage.write_text(storage.join(directory, IDS), text)
        about = {"pairs": len(self.ids), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        storage.write_json(storage.join(directory, _TRAINING), about)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Return the validation means."""
        return {name: float(value) for name, value in means.items()}

    def _inputs(self, batch: dict[str, Tensor]) -> TowerInputs:
        """Return what the towers see; a validation sees the same in every epoch."""
        joint = self.config.joint
        inputs = TowerInputs(
            batch["ground"].float() / 255,
            batch["aerial"].float() / 255,
            batch["synthetic"].float() / 255 if joint else None,
            batch["synthetic_mask"] if joint else None,
        )
        epoch = int(batch["epoch"])
        if self.training and self.config.augment:
            inputs = augment(inputs, batch["key"], self.seed, epoch)
        if not self.config.limits_view:
            return inputs
        heading = rng.uniform(batch["key"], rng.fold_in(self.seed, epoch, "heading"))
        heading = 360 * heading * self.config.unknown_heading
        fov, mean = self.config.fov, self.model.ground_mean
        return inputs._replace(ground=crop_fov(inputs.ground, fov, heading, mean))

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
        self, ground: Tensor, synthetic: Tensor, mask: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the learned null in the place of some rows' features, never of both G and A."""
        if not self.training:
            return ground, synthetic, mask

        def drops(share: float, purpose: str) -> Tensor:
            stream = rng.fold_in(self.seed, int(batch["epoch"]), purpose)
            return (rng.uniform(batch["key"], stream) < share)[:, None]

        ground_share, synthetic_share, mask_share = self.config.modality_dropout
        no_a = drops(synthetic_share, "drop synthetic")
        no_g = drops(ground_share, "drop ground") & ~no_a
        no_s = drops(mask_share, "drop classes")
        return (
            torch.where(no_g, self.model.null_ground, ground),
            torch.where(no_a, self.model.null_synthetic, synthetic),
            torch.where(no_s, self.model.null_mask, mask),
        )

    def _loss(self, score: Tensor) -> Tensor:
        if self.log_scale is None:
            return losses.triplet(score, self.config.margin)
        return losses.info_nce(score, self.log_scale.exp().clamp(max=100.0), SMOOTHING)


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


def _recall_at_1(score: Tensor) -> Tensor:
    truth = torch.arange(len(score), device=score.device)
    return (metrics.ranks(score, truth) == 0).float().mean()
