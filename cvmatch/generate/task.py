"""The generator's training steps: a batch of pairs -> its losses and validation metrics."""

import os
from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.evaluate import generation
from cvmatch.generate import losses
from cvmatch.generate.batches import CLIP_TOKENS, LATENT, PairBatch, augment, to_pair_batch
from cvmatch.generate.conditioning import Condition, PanoramaFeatures, PolarToBEV
from cvmatch.generate.losses import LPIPS, NegativeQueue, Negatives
from cvmatch.generate.model import Generator, merge_lora, set_trainable
from cvmatch.generate.settings import TrainGenerator
from cvmatch.nn import metrics, rng
from cvmatch.nn.color import color_jitter
from cvmatch.training.ema import EMA, trained_weights
from cvmatch.training.metrics import ROW_KEY, ROWS
from cvmatch.training.task import ParameterGroup

VALIDATION_LEVELS = (0.2, 0.5, 0.8)
"""Noise levels t / T of the validation loss, the same for every row."""

IMAGE_EVERY = 2
"""Steps from one with the image losses, CLIP and LPIPS, to the next; these weigh as much more."""

MIN_SIGNAL = 0.3
"""Least share of signal (alphas_cumprod) in the noisy latent for the image losses."""

X0_NCE_MIN_LEVEL = 0.75
"""Least noise level t / T for the InfoNCE loss on x0: with less, the input tells it all."""

GRID_ROWS = 6
"""Rows of the picture G | A | C of a validation."""

_BEV_FILE = "bev.safetensors"


class GeneratorTask(nn.Module):
    """The training step of the whole generator, on batches of `batches.read_latents`."""

    step_count: Tensor

    def __init__(
        self,
        generator: Generator,
        config: TrainGenerator,
        lpips: LPIPS | None = None,
        seed: int = 0,
        sampled: Collection[int] = (),
    ) -> None:
        """`lpips` may be None where `config.lpips_weight` is 0.

        `sampled` are the keys of the validation rows that are sampled.
        """
        super().__init__()
        if config.lpips_weight and lpips is None:
            raise ValueError("GeneratorTask: lpips_weight needs an LPIPS network, or 0.")
        self.generator, self.config, self.lpips = generator, config, lpips
        self.seed, self.sampled = seed, frozenset(sampled)
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        channels, size, _ = generator.latent_shape
        self.latent_to_rgb = nn.Conv2d(channels, 3, 3, padding=1) if config.x0_nce_weight else None
        self.queue = NegativeQueue(size)
        set_trainable(generator.unet, config.train_unet, config.lora_rank)
        self.frozen_bev = config.pretrain_bev > 0
        if self.frozen_bev:
            generator.conditioner.bev.requires_grad_(False)
        if config.gradient_checkpointing:
            generator.unet.enable_gradient_checkpointing()
        self.ema = EMA(config.ema_decay) if config.ema_decay else None
        self._averaged: list[Generator] = []  # a list, since a module would become a part of this

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch's losses; in evaluation mode those of `_validate`."""
        if not self.training:
            pairs = to_pair_batch(batch)
            return self._validate(*_select_encodings(batch, pairs), pairs, batch["key"])
        pairs = augment(batch, self.config.mirror, self.seed)
        latent, features = _select_encodings(batch, pairs)
        self._update_ema()
        condition = self.generator.condition(features)
        negatives = self.queue.negatives(batch["key"])
        terms = self._diffusion_losses(latent, condition, pairs.tile, batch, negatives)
        if not self.frozen_bev:
            network = self.generator.conditioner.bev
            terms |= losses.bev_losses(network, condition.bev, pairs.tile, pairs.mask, negatives)
        self.queue.enqueue(batch["key"], pairs.tile)
        return _with_loss(self.config, terms)

    def train(self, mode: bool = True) -> "GeneratorTask":
        """Set the mode; each validation averages anew."""
        self._averaged.clear()
        super().train(mode)
        if self.frozen_bev:
            self.generator.conditioner.bev.eval()
        return self

    def groups(self) -> list[ParameterGroup]:
        """Return parameters by learning rate: the base's, and what starts from random weights."""
        model = self.generator
        new: list[nn.Module | None] = [model.conditioner, self.latent_to_rgb]
        return [
            {"params": trained_weights(model.unet), "lr": self.config.lr},
            {
                "params": [
                    weight for part in new if part is not None for weight in part.parameters()
                ],
                "lr": self.config.lr_conditioner,
            },
        ]

    def save(self, directory: str) -> None:
        """Write the directory that `Generator.load` reads."""
        merge_lora(self.eval_model()).save(directory)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float | np.ndarray]:
        """Return the validation's means and an image of samples.

        `gap` is the share by which a shuffled panorama is worse, 0 where it is ignored; `gap/0.8`
        and the like are of one noise level. Rows that were alone in their batch had none to be
        shuffled with; where all were, there is neither `gap` nor `loss_shuffled`.

        Of the sampled rows: mean PSNR (dB), SSIM, NCC and LPIPS, recall and mean reciprocal rank
        of the true tile by NCC among them (`generation.summarize_ranks`), and the picture
        `samples`, G | A | C.
        """
        summary: dict[str, float | np.ndarray] = {
            k: float(v) for k, v in means.items() if not v.ndim
        }
        compared = summary.pop("compared")
        for level in ("", *(f"/{level}" for level in VALIDATION_LEVELS)):
            right, wrong = summary[f"loss_correct{level}"], summary.pop(f"loss_shuffled{level}")
            if compared:  # the difference of the other rows is 0
                gap = (wrong - right) / compared / max(right, 1e-12)
                summary |= {f"gap{level}": gap, f"loss_shuffled{level}": right * (1 + gap)}
        rows = {k.removeprefix(ROWS): v for k, v in means.items() if k.startswith(ROWS)}
        if rows:
            del rows["key"]
            view, sampled, true = (rows.pop(name) for name in ("view", "sampled", "true"))
            summary |= {name: value.mean().item() for name, value in rows.items()}
            rank = generation.rank_by_ncc(metrics.planes(sampled), metrics.planes(true))
            summary["retrieval_mrr"] = metrics.mean_reciprocal_rank(rank)
            recall = generation.summarize_ranks(rank)
            # MLflow's names have neither @ nor %.
            summary |= {
                k.replace("@", "_at_").replace("%", "_percent"): v
                for k, v in recall.to_json().items()
            }
            grid = view[:GRID_ROWS], sampled[:GRID_ROWS], true[:GRID_ROWS]
            summary["samples"] = image_grid(*grid)
        return summary

    def eval_model(self) -> Generator:
        """Return what is validated and saved: the generator, or a copy with averaged weights."""
        if self.ema is None:
            return self.generator
        if not self._averaged:
            self._averaged.append(self.ema.of(self.generator).eval())
        return self._averaged[0]

    def _update_ema(self) -> None:
        if self.ema is None:
            return
        weights = trained_weights(self.generator)
        # The loop drops gradients when it moves weights; these wait for more (accumulate).
        if all(weight.grad is None for weight in weights):
            self.ema.update(weights)

    def _diffusion_losses(
        self,
        latent: Tensor,
        condition: Condition,
        tile: Tensor,
        batch: dict[str, Tensor],
        negatives: Negatives,
    ) -> dict[str, Tensor]:
        model, config, keys = self.generator, self.config, batch["key"]
        schedule = model.schedule

        def stream(purpose: str) -> int:
            return rng.fold_in(self.seed, int(batch["epoch"]), purpose)

        timestep = (rng.uniform(keys, stream("step")) * len(schedule)).long()
        noise = rng.normal(keys, stream("noise"), *model.latent_shape)
        keep = rng.uniform(keys, stream("drop")) >= config.conditioning_dropout
        noisy = schedule.add_noise(latent, noise, timestep)
        condition = model.conditioner.drop(condition, keep)
        model_pred = model.predict(noisy, timestep, condition).float()
        error = (model_pred - schedule.target(latent, noise, timestep)).square()
        terms = {"noise": error.mean(dim=(1, 2, 3)).mean()}
        if self.latent_to_rgb is not None:
            rows = keep & (timestep >= X0_NCE_MIN_LEVEL * len(schedule))
            x0 = schedule.predict_x0(noisy, model_pred, timestep)
            terms |= losses.x0_nce_losses(self.latent_to_rgb, latent, x0, tile, rows, negatives)
        due = int(self.step_count) % IMAGE_EVERY == 0
        self.step_count += 1
        if due and (config.clip_weight or config.lpips_weight):
            rows, strength = losses.select_rows(
                schedule.alphas_cumprod[timestep],
                rng.uniform(keys, stream("image")),
                config.image_rows,
                MIN_SIGNAL,
            )
            x0 = schedule.predict_x0(noisy[rows], model_pred[rows], timestep[rows])
            strength = strength * IMAGE_EVERY  # so that the mean over steps stays the same
            lpips = self.lpips if config.lpips_weight else None
            terms |= losses.image_losses(model.encoders, lpips, x0, tile[rows], strength)
        return terms

    def _validate(
        self, latent: Tensor, features: PanoramaFeatures, pairs: PairBatch, keys: Tensor
    ) -> dict[str, Tensor]:
        """Return the noise loss with the row's own panorama and with its neighbour's.

        The published weights are validated, at VALIDATION_LEVELS. `compared` is the share of rows
        that have a neighbour. The rows of `sampled` are also sampled.
        """
        model = self.eval_model()
        condition = model.condition(features)
        totals = {"loss_correct": latent.new_zeros(()), "loss_shuffled": latent.new_zeros(())}
        for level in VALIDATION_LEVELS:
            timestep = torch.full_like(keys, round(level * len(model.schedule)))
            stream = rng.fold_in(self.seed, purpose=f"validation {level}")
            noise = rng.normal(keys, stream, *model.latent_shape)
            noisy = model.schedule.add_noise(latent, noise, timestep)
            target = model.schedule.target(latent, noise, timestep)
            for name, given in (("loss_correct", condition), ("loss_shuffled", condition.roll())):
                error = F.mse_loss(model.predict(noisy, timestep, given).float(), target)
                totals[name] = totals[name] + error / len(VALIDATION_LEVELS)
                totals[f"{name}/{level}"] = error
        compared = latent.new_tensor(float(len(keys) > 1))
        means = {"loss": totals["loss_correct"], "compared": compared, **totals}
        network = model.conditioner.bev
        means |= losses.bev_losses(network, condition.bev, pairs.tile, pairs.mask)
        rows = [row for row, key in enumerate(keys.tolist()) if key in self.sampled]
        if rows:
            chosen = PanoramaFeatures(*(value[rows] for value in features))
            means |= self._sample(model, chosen, pairs.tile[rows], keys[rows])
        return means

    def _sample(
        self, model: Generator, features: PanoramaFeatures, tile: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """Return sampled images and their metrics against the true tiles, row by row."""
        # In 8 bits, as they are written: the last bits depend on the rows of the batch.
        sampled = (model.sample_images(features, keys) * 255).round() / 255
        rows = {metric.__name__: metric(sampled, tile) for metric in generation.SIMILARITIES}
        if self.lpips is not None:
            rows["lpips"] = self.lpips(sampled, tile)
        rows |= {"sampled": sampled, "true": tile, "view": features.view}
        return {f"{ROWS}{name}": value for name, value in rows.items()} | {ROW_KEY: keys}


class BEVTask(nn.Module):
    """The training step of the BEV network alone: a cheap start for the generator's."""

    def __init__(self, config: TrainGenerator, size: int, seed: int = 0) -> None:
        """`size` is the side of the BEV map, in cells."""
        super().__init__()
        self.config, self.size, self.seed = config, size, seed
        self.network = PolarToBEV(config.conditioning.bev_channels)
        self.queue = NegativeQueue(size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the BEV losses of a batch."""
        if not self.training:
            return self._losses(to_pair_batch(batch))
        pairs = augment(batch, self.config.mirror, self.seed)
        negatives = self.queue.negatives(batch["key"])
        # Panorama and tile were taken at different times of day (docs/decisions.md).
        stream = rng.fold_in(self.seed, int(batch["epoch"]), "colour of ground")
        view = color_jitter(pairs.ground_view, batch["key"], stream)
        means = self._losses(pairs._replace(ground_view=view), negatives)
        self.queue.enqueue(batch["key"], pairs.tile)
        return means

    def groups(self) -> list[ParameterGroup]:
        """Return all parameters, at `lr_conditioner`."""
        return [{"params": list(self.network.parameters()), "lr": self.config.lr_conditioner}]

    def save(self, directory: str) -> None:
        """Write the BEV network's weights, which `load_bev` reads."""
        os.makedirs(directory, exist_ok=True)
        save_file(self.network.state_dict(), os.path.join(directory, _BEV_FILE))

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Return the validation's means."""
        return {name: float(value) for name, value in means.items()}

    def _losses(self, pairs: PairBatch, negatives: Negatives | None = None) -> dict[str, Tensor]:
        bev = self.network(pairs.ground_view, self.size)
        terms = losses.bev_losses(self.network, bev, pairs.tile, pairs.mask, negatives)
        return _with_loss(self.config, terms)


def load_bev(network: PolarToBEV, directory: str) -> None:
    """Load the weights that `BEVTask.save` wrote."""
    network.load_state_dict(load_file(os.path.join(directory, _BEV_FILE)))


def image_grid(
    ground: Float[Tensor, "row 3 h w"],
    sampled: Float[Tensor, "row 3 size size"],
    aerial: Float[Tensor, "row 3 size size"],
) -> UInt8[np.ndarray, "height width 3"]:
    """Return rows of panorama, synthetic aerial and true aerial, in [0, 1], as one image."""
    height = sampled.shape[-1]
    width = round(ground.shape[-1] * height / ground.shape[-2])
    ground = F.interpolate(ground, (height, width), mode="bilinear", antialias=True)
    grid = torch.cat([ground, sampled, aerial], dim=-1).permute(0, 2, 3, 1).flatten(0, 1)
    return (grid.clamp(0, 1) * 255).round().byte().cpu().numpy()


def _select_encodings(
    batch: dict[str, Tensor], pairs: PairBatch
) -> tuple[Tensor, PanoramaFeatures]:
    """Return cached latents and panorama features of pairs as they are or mirrored."""
    row = torch.arange(len(pairs.mirrored), device=pairs.mirrored.device)
    variant = pairs.mirrored.long()
    latent, tokens = (batch[name][row, variant].float() for name in (LATENT, CLIP_TOKENS))
    return latent, PanoramaFeatures(tokens, pairs.ground_view)


def _with_loss(config: TrainGenerator, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    total = losses.weighted_sum(config, terms)
    return {"loss": total, **{name: value.detach() for name, value in terms.items()}}
