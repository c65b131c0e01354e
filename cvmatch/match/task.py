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
from cvmatch.match.augment import Views, augmented, limited
from cvmatch.match.model import Matcher
from cvmatch.match.settings import MatcherLossConfig
from cvmatch.nn import metrics, rng

IDS = "training_ids.txt"
"""File of a model directory that lists the pairs it was trained on, one id a line, sorted."""

_TRAINING = "training.json"


class MatcherTask(nn.Module):
    """`ground`, `aerial`, `synthetic` (uint8, CHW), `classes` (ids, HW), `key` -> the loss.

    Where `w_joint` is 0, `synthetic` and `classes` need not be there.
    """

    def __init__(
        self,
        model: Matcher,
        recipe: MatcherLossConfig,
        ids: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        """`ids` of the training pairs go into the model directory."""
        super().__init__()
        self.model, self.recipe, self.ids, self.seed = model, recipe, ids, seed
        # Only where it is used: DDP waits for the gradient of every parameter.
        learned = recipe.loss == "infonce"
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log()) if learned else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss and its parts; in evaluation mode also the recall among the batch's own tiles.

        A batch is a small gallery: that recall compares epochs and trials. `evaluate` measures the
        whole one.
        """
        found = self.scores(batch)
        parts = {name: self._loss(score) for name, score in found.items()}
        weights = {"joint": self.recipe.w_joint, "direct": self.recipe.w_direct}
        total = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
        named = {"loss": total} | {name: value.detach() for name, value in parts.items()}
        if self.training:
            return named
        recalls = {f"batch_recall_at_1_{name}": _first(score) for name, score in found.items()}
        # Of the fullest queries there are: what trials and epochs are compared by.
        best = recalls[f"batch_recall_at_1_{'joint' if 'joint' in found else 'direct'}"]
        return named | recalls | {"batch_recall_at_1": best}

    def scores(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, "all all"]]:
        """Scores of all queries (rows) and tiles (columns) of all workers: `direct`, and `joint`.

        Every tile of a row is embedded with that query's own A. With a tile's own A, A would tell
        the pair without a look at the tile, and a loss near zero would mean nothing.
        """
        views = self._views(batch)
        model = self.model
        ground = self._features(model.ground_features, views.ground)
        pictures = [picture for picture in (views.aerial, views.synthetic) if picture is not None]
        tile, *synthetic = self._features(model.aerial_features, torch.cat(pictures)).split(
            len(ground)
        )
        # In validation, workers see different numbers of batches, so nothing can be gathered.
        gathered = losses.gathered if self.training else nn.Identity()
        tile_proj = model.tile_linear(tile)
        alone = model.fuse(ground, None, None)
        own = gathered(model.shortlist(tile_proj).float())
        with torch.autocast(
            tile_proj.device.type, enabled=False
        ):  # bf16 has ties: 8 bits of a cosine
            found = {"direct": gathered(alone.embedding.float() @ own.T)}
        if views.classes is not None:
            classes = self._features(model.class_features, views.classes)
            query = model.fuse(*self._dropped(ground, synthetic[0], classes, batch))
            found["joint"] = gathered(model.pair_scores(query, gathered(tile_proj.float())))
        return found

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate: backbones, and what starts from random weights."""
        towers = [weight for name, weight in self.named_parameters() if "_tower." in name]
        heads = [weight for name, weight in self.named_parameters() if "_tower." not in name]
        return [
            {"params": towers, "lr": self.recipe.lr_towers},
            {"params": heads, "lr": self.recipe.lr_heads},
        ]

    def save(self, directory: str) -> None:
        """Write the directory that `Matcher.load` and `training_ids` read."""
        self.model.save(directory)
        text = "".join(f"{pair_id}\n" for pair_id in self.ids)
        storage.write_text(storage.join(directory, IDS), text)
        about = {"pairs": len(self.ids), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        storage.write_json(storage.join(directory, _TRAINING), about)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Validation means."""
        return {name: float(value) for name, value in means.items()}

    def _views(self, batch: dict[str, Tensor]) -> Views:
        """What the towers see; a validation sees the same in every epoch."""
        joint = self.recipe.joint
        views = Views(
            batch["ground"].float() / 255,
            batch["aerial"].float() / 255,
            batch["synthetic"].float() / 255 if joint else None,
            batch["classes"] if joint else None,
        )
        epoch = int(batch["epoch"])
        if self.training and self.recipe.augment:
            views = augmented(views, batch["key"], self.seed, epoch)
        if not self.recipe.limited:
            return views
        turn = rng.uniform(batch["key"], rng.fold_in(self.seed, epoch, "heading"))
        turn = 360 * turn * self.recipe.unknown_heading
        return views._replace(ground=limited(views.ground, self.recipe.fov, turn))

    def _features(self, tower: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        """Features of pictures, `chunk` at a time.

        The loss sees all rows at once, so its gradient is exact: the method of GradCache (Gao et
        al. 2021), by recomputation. Batch normalisation sees a chunk alone, and counts it twice.
        """
        chunk = self.recipe.chunk
        if not (chunk and self.training):
            return tower(pictures)
        parts = pictures.split(chunk)
        return torch.cat([checkpoint(tower, part, use_reentrant=False) for part in parts])

    def _dropped(
        self, ground: Tensor, synthetic: Tensor, classes: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tower features with the learned null in some rows, never of both G and A."""
        if not self.training:
            return ground, synthetic, classes

        def falls(share: float, purpose: str) -> Tensor:
            stream = rng.fold_in(self.seed, int(batch["epoch"]), purpose)
            return (rng.uniform(batch["key"], stream) < share)[:, None]

        no_a = falls(self.recipe.drop_synthetic, "drop synthetic")
        no_g = falls(self.recipe.drop_ground, "drop ground") & ~no_a
        no_s = falls(self.recipe.drop_classes, "drop classes")
        return (
            torch.where(no_g, self.model.null_ground, ground),
            torch.where(no_a, self.model.null_synthetic, synthetic),
            torch.where(no_s, self.model.null_classes, classes),
        )

    def _loss(self, score: Tensor) -> Tensor:
        recipe = self.recipe
        if recipe.loss == "triplet":
            return losses.triplet(score, recipe.margin, recipe.negatives)
        if self.log_scale is None:
            return losses.soft_margin(score)
        return losses.info_nce(score, self.log_scale.exp().clamp(max=100.0), recipe.smoothing)


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


def _first(score: Tensor) -> Tensor:
    truth = torch.arange(len(score), device=score.device)
    return (metrics.ranks(score, truth) == 0).float().mean()
