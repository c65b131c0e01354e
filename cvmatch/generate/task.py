"""The generator's training step: a batch of pairs -> its losses, and what a validation shows."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.evaluate import generation
from cvmatch.generate import finetune, losses
from cvmatch.generate.augment import Pairs, pairs_of, varied
from cvmatch.generate.conditioning import Condition, Seen
from cvmatch.generate.image_grid import sheet
from cvmatch.generate.model import Generator
from cvmatch.generate.negatives import Known, Rivals
from cvmatch.generate.perceptual import Lpips
from cvmatch.generate.settings import Recipe
from cvmatch.nn import metrics, rng
from cvmatch.training.metrics import ROWS

VALIDATION = (0.2, 0.5, 0.8)
"""Noise levels of the validation loss, as shares of the schedule: the same for every row."""

SHOWN = 6
"""Rows of the picture G | A | C of a validation."""


class GeneratorTask(nn.Module):
    """`ground`, `aerial` (uint8, CHW), `classes` (ids, HW), `key` -> the generator's losses.

    Where the batch has `latent` and `states` (of each variant: `encode`), these are used in place
    of the frozen encoders, and `ground` is the view of the rays.
    """

    steps: Tensor

    def __init__(
        self,
        generator: Generator,
        recipe: Recipe,
        perceptual: Lpips | None = None,
        seed: int = 0,
    ) -> None:
        """`perceptual` may be None where `recipe.w_vae` is 0."""
        super().__init__()
        if recipe.w_vae and perceptual is None:
            raise ValueError("GeneratorTask: w_vae needs a perceptual network, or w_vae=0")
        self.generator, self.recipe, self.perceptual = generator, recipe, perceptual
        self.seed, self.judged = seed, 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.colours = (
            nn.Conv2d(generator.latent[0], 3, 3, padding=1) if recipe.w_identify else None
        )
        self.rivals = Rivals(recipe.rivals, generator.latent[1])
        # CLIP also judges pictures, and must not learn to be pleased.
        self.judging = copy.deepcopy(generator.frozen) if recipe.train_clip else generator.frozen
        finetune.choose(generator, recipe.train_unet, recipe.lora_rank, recipe.train_clip)
        if recipe.freeze_rays and generator.conditioning.geometry:
            generator.conditioner.rays.requires_grad_(False)
        if recipe.save_memory:
            generator.unet.enable_gradient_checkpointing()
        self.average = finetune.Average(recipe.ema) if recipe.ema else None
        self._means: list[Generator] = []  # a list, since a module would become a part of this

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch; in evaluation mode with the right and with a shuffled panorama."""
        pairs = varied(batch, self.recipe, self.seed) if self.training else pairs_of(batch)
        latent, seen = self._seen(batch, pairs)
        if not self.training:
            return self._validate(latent, seen, pairs, batch["key"])
        if self.average:
            weights = finetune.trained_weights(self.generator)
            # The loop drops gradients when it moves weights; these wait for more (accumulate).
            if all(weight.grad is None for weight in weights):
                self.average.update(weights)
        condition = self.generator.condition(seen)
        known = self.rivals.known(batch["key"])
        named = self._diffuse(latent, condition, pairs.tile, batch, known)
        if condition.map is not None and not self.recipe.freeze_rays:
            named |= self._map_terms(self.generator, condition.map, pairs, known)
        self.rivals.remember(batch["key"], pairs.tile)
        total = losses.total(self.recipe, named)
        return {"loss": total, **{name: value.detach() for name, value in named.items()}}

    def train(self, mode: bool = True) -> "GeneratorTask":
        """A validation is of the mean weights, where there are any, and judges its first rows."""
        self.judged = 0
        self._means.clear()
        super().train(mode)
        if self.recipe.freeze_rays and self.generator.conditioning.geometry:
            self.generator.conditioner.rays.eval()
        return self

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate: the base's, and what starts from random weights."""
        model = self.generator
        base = [p for part in (model.unet, model.frozen) for p in part.parameters()]
        parts = [part for part in (model.conditioner, self.colours) if part is not None]
        new = [weight for part in parts for weight in part.parameters()]
        trained = [weight for weight in base if weight.requires_grad]
        return [
            {"params": trained, "lr": self.recipe.lr},
            {"params": new, "lr": self.recipe.lr_rays},
        ]

    def save(self, directory: str) -> None:
        """Write the directory that `Generator.load` reads."""
        finetune.merged(self.published()).save(directory)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float | np.ndarray]:
        """Validation means; `gap`: by which share a shuffled panorama is worse, 0 where not used.

        `gap/0.8` and the like are of one noise level. Rows that were alone in their batch had none
        to be shuffled with; where all were, there is neither `gap` nor `loss_shuffled`.

        Of the judged rows: mean PSNR (dB), SSIM, NCC and LPIPS, recall of the true tile by the
        NCC among them (`generation.retrieve_by_ncc`), and the picture `samples`, G | A | C.
        """
        found: dict[str, Any] = {k: float(v) for k, v in means.items() if not v.ndim}
        compared = found.pop("compared")
        for at in ("", *(f"/{share}" for share in VALIDATION)):
            right, wrong = found[f"loss_correct{at}"], found.pop(f"loss_shuffled{at}")
            if compared:  # the difference of the other rows is 0
                gap = (wrong - right) / compared / max(right, 1e-12)
                found |= {f"gap{at}": gap, f"loss_shuffled{at}": right * (1 + gap)}
        kept = {k.removeprefix(ROWS): v for k, v in means.items() if k.startswith(ROWS)}
        if kept:
            view, drawn, true = (kept.pop(name) for name in ("view", "drawn", "true"))
            found |= {name: value.mean().item() for name, value in kept.items()}
            found |= _metric_names(
                generation.retrieve_by_ncc(metrics.planes(drawn), metrics.planes(true)).to_json()
            )
            found["samples"] = sheet(view[:SHOWN], drawn[:SHOWN], true[:SHOWN])
        return found

    def published(self) -> Generator:
        """What is validated and saved: the generator, or a copy with its mean weights."""
        if self.average is None:
            return self.generator
        if not self._means:
            self._means.append(self.average.of(self.generator).eval())
        return self._means[0]

    # --- the parts of a step ---

    def _seen(self, batch: dict[str, Tensor], pairs: Pairs) -> tuple[Tensor, Seen]:
        """Latent, and what is seen of the panorama, of one variant of each row."""
        if "latent" not in batch:
            return self.generator.frozen.encode(pairs.tile).float(), self._look(pairs.ground)
        row = torch.arange(len(pairs.variant), device=pairs.variant.device)
        latent, states = (batch[name][row, pairs.variant].float() for name in ("latent", "states"))
        return latent, Seen(states, pairs.ground)

    def _look(self, ground: Tensor) -> Seen:
        model = self.generator if self.training else self.published()  # CLIP may have a mean, too
        with torch.set_grad_enabled(self.training and self.recipe.train_clip > 0):
            return model.frozen.look(ground)

    def _diffuse(
        self,
        latent: Tensor,
        condition: Condition,
        tile: Tensor,
        batch: dict[str, Tensor],
        known: Known,
    ) -> dict[str, Tensor]:
        model, recipe, keys = self.generator, self.recipe, batch["key"]

        def numbers(purpose: str) -> int:
            return rng.fold_in(self.seed, int(batch["epoch"]), purpose)

        step = (rng.uniform(keys, numbers("step")) * len(model.noise.signal)).long()
        noise = rng.normal(keys, numbers("noise"), *model.latent)
        keep = rng.uniform(keys, numbers("drop")) >= recipe.drop
        noisy = model.noise.add(latent, noise, step)
        answer = model.predict(noisy, step, model.conditioner.dropped(condition, keep)).float()
        error = (answer - model.noise.target(latent, noise, step)).square().mean(dim=(1, 2, 3))
        named = {"noise": (model.noise.weight(step, recipe.min_snr) * error).mean()}
        if self.colours is not None:
            rows = keep & (step >= recipe.identify_noise * len(model.noise.signal))
            clean = model.noise.clean(noisy, answer, step)
            named |= losses.identify_terms(self.colours, latent, clean, tile, rows, known)
        acts = int(self.steps) % recipe.image_every == 0 and (recipe.w_clip or recipe.w_vae)
        self.steps += 1
        if acts:
            order = rng.uniform(keys, numbers("image"))
            rows, strength = losses.image_rows(
                model.noise.signal[step], order, recipe.image_rows, recipe.image_signal
            )
            clean = model.noise.clean(noisy[rows], answer[rows], step[rows])
            strength = strength * recipe.image_every  # so that the mean over steps stays the same
            perceptual = self.perceptual if recipe.w_vae else None
            named |= losses.image_terms(self.judging, perceptual, clean, tile[rows], strength)
        return named

    def _validate(
        self, latent: Tensor, seen: Seen, pairs: Pairs, keys: Tensor
    ) -> dict[str, Tensor]:
        """Noise error over VALIDATION, with the row's own panorama and with its neighbour's.

        `compared` is the share of rows that have a neighbour.
        """
        model = self.published()
        condition = model.condition(seen)
        totals = {"loss_correct": latent.new_zeros(()), "loss_shuffled": latent.new_zeros(())}
        for share in VALIDATION:
            step = torch.full_like(keys, round(share * len(model.noise.signal)))
            stream = rng.fold_in(self.seed, purpose=f"validation {share}")
            noise = rng.normal(keys, stream, *model.latent)
            noisy, target = (
                model.noise.add(latent, noise, step),
                model.noise.target(latent, noise, step),
            )
            for name, given in (
                ("loss_correct", condition),
                ("loss_shuffled", condition.rolled()),
            ):
                error = F.mse_loss(model.predict(noisy, step, given).float(), target)
                totals[name] = totals[name] + error / len(VALIDATION)
                totals[f"{name}/{share}"] = error
        compared = latent.new_tensor(float(len(keys) > 1))
        found = {"loss": totals["loss_correct"], "compared": compared, **totals}
        if condition.map is not None:
            found |= self._map_terms(model, condition.map, pairs)
        rows = min(len(keys), self.recipe.judge - self.judged)
        if rows > 0:
            self.judged += rows
            part = Seen(*(value[:rows] for value in seen))
            found |= self._judged(model, part, pairs.tile[:rows], keys[:rows])
        return found

    def _judged(
        self, model: Generator, seen: Seen, tile: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """What is drawn of panoramas, and how near it comes to the true tiles, row by row."""
        drawn = model.draw(seen, keys)
        found = {metric.__name__: metric(drawn, tile) for metric in generation.SIMILARITIES}
        if self.perceptual is not None:
            found["lpips"] = self.perceptual(drawn, tile)
        found |= {"drawn": drawn, "true": tile, "view": seen.view}
        return {f"{ROWS}{name}": value for name, value in found.items()}

    @staticmethod
    def _map_terms(
        model: Generator, drawn: Tensor, pairs: Pairs, known: Known | None = None
    ) -> dict[str, Tensor]:
        return losses.map_terms(model.conditioner.rays, drawn, pairs.tile, pairs.classes, known)


def _metric_names(values: dict[str, float]) -> dict[str, float]:
    """MLflow's names have neither @ nor %."""
    return {k.replace("@", "_at_").replace("%", "_percent"): v for k, v in values.items()}
