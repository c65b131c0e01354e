"""Fine-tune the generator: pairs -> a published model directory."""

import dataclasses
import functools
import os
from typing import Any, Literal

import torch
from ray.data import Dataset
from ray.train import Result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch import draws, engine, storage, tracking, training
from cvmatch.generate import loss, parts
from cvmatch.generate.condition import Condition, Conditioning
from cvmatch.generate.model import Generator
from cvmatch.generate.pairs import decode
from cvmatch.generate.perceptual import Lpips
from cvmatch.generate.rays import Rays
from cvmatch.generate.samples import sample_grid
from cvmatch.ingest import Ingest, ingest

VALIDATION = (0.2, 0.5, 0.8)
"""Noise levels of the validation loss, as shares of the schedule: the same for every row."""

_RAYS = "rays.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainGenerator:
    """Fine-tune a latent diffusion model to draw the tile of a panorama."""

    data: Ingest = dataclasses.field(default_factory=Ingest)
    """Pairs to train on."""
    val: Ingest | None = None
    """Pairs for the validation loss."""
    diffusion: str = parts.DIFFUSION
    """Base model in Stable Diffusion's layout: hub id or local directory."""
    revision: str = "main"
    """Revision of `diffusion` on the hub."""
    clip: str = parts.CLIP
    """CLIP with a vision tower: hub id or local directory."""
    perceptual: str = "vgg16"
    """Network of LPIPS: vgg16 (ImageNet), or a local tower directory of a VGG."""
    perceptual_weights: str = ""
    """Local file with vgg16's weights; empty: torchvision's hub."""
    conditioning: Conditioning = dataclasses.field(default_factory=Conditioning)
    """What the UNet sees of the panorama."""
    w_noise: float = 1.0
    """Weight of the squared error of the noise, or velocity."""
    w_clip: float = 2.0
    """Weight of 1 - cos of CLIP's vectors of the predicted and the true tile; 0: not computed."""
    w_vae: float = 1.0
    """Weight of LPIPS between the decoded prediction and the true tile; 0: not computed."""
    w_map: float = 1.0
    """Weight of the squared error of the tile that the geometry map draws."""
    w_contrast: float = 0.05
    """Weight of telling the true tile from the batch's others by that drawing."""
    image_rows: int = 4
    """Rows of a step (of one worker) that the two image terms, w_clip and w_vae, look at."""
    image_every: int = 2
    """Every how many steps the image terms act, then with as many times their weight."""
    image_signal: float = 0.3
    """Least share of signal in the noisy latent, in variance, for the image terms to act."""
    drop: float = 0.1
    """Share of rows whose whole condition becomes the null, for classifier-free guidance."""
    lr: float = 1e-5
    """Learning rate of the UNet."""
    lr_rays: float = 1e-3
    """Learning rate of what starts from random weights: projection, null and rays."""
    train_unet: Literal["all", "attention"] = "all"
    """attention: only the cross-attention and the input convolution, for small GPUs."""
    save_memory: bool = False
    """Recompute the UNet's activations in the backward pass: a third slower, much less memory."""
    pretrain_rays: int = 0
    """Epochs that train the rays alone before; many times cheaper than diffusion's. 0: none."""
    freeze_rays: bool = False
    """Keep the rays as `pretrain_rays` left them: a step takes a third less time."""
    samples: int = 4
    """Rows of the picture G | A | C that the MLflow run gets at the end; 0: none."""
    output: str = "models/generator"
    """Directory of the published model."""
    fit: training.Fit = dataclasses.field(default_factory=training.Fit)
    """The training loop."""

    def __post_init__(self) -> None:
        if self.image_rows < 1 or self.image_every < 1:
            raise ValueError(
                f"train_generator: expected image_rows and image_every of at least 1, got "
                f"{self.image_rows} and {self.image_every}; to leave the image terms out, set "
                "w_clip and w_vae to 0."
            )
        if not 0 <= self.drop < 1:
            raise ValueError(f"train_generator: drop is a share in [0, 1), got {self.drop}.")
        if self.freeze_rays and not self.pretrain_rays:
            raise ValueError(
                "train_generator: expected pretrain_rays of at least 1 with freeze_rays, got 0: "
                "the rays would stay random. Set --pretrain-rays 5, or do not freeze them."
            )


class GeneratorTask(nn.Module):
    """`ground`, `aerial` (uint8, CHW) and `key` -> the losses of the generator.

    Where the batch has `latent` or `states` (results of `Generator.encode` and `.states`), these
    are used in place of running the frozen encoders.
    """

    steps: Tensor

    def __init__(
        self, generator: Generator, config: TrainGenerator, perceptual: Lpips | None = None
    ) -> None:
        """`perceptual` may be None where `config.w_vae` is 0."""
        super().__init__()
        if config.w_vae and perceptual is None:
            raise ValueError("GeneratorTask: w_vae needs a perceptual network, or w_vae=0")
        self.generator, self.config, self.perceptual = generator, config, perceptual
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if config.train_unet == "attention":
            for name, weight in generator.unet.named_parameters():
                weight.requires_grad_(".attn2." in name or name.startswith("conv_in."))
        if config.freeze_rays and generator.conditioning.geometry:
            generator.conditioner.rays.requires_grad_(False)
        if config.save_memory:
            generator.unet.enable_gradient_checkpointing()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch; in evaluation mode with the right and with a shuffled panorama."""
        panorama, tile = batch["ground"].float() / 255, batch["aerial"].float() / 255
        latent = batch["latent"] if "latent" in batch else self.generator.encode(tile).float()
        condition = self.generator.condition(panorama, batch.get("states"))
        drawn = {}
        if condition.map is not None and not (self.training and self.config.freeze_rays):
            drawn = loss.map_terms(self.generator.conditioner.rays.picture(condition.map), tile)
        if not self.training:
            return self._validate(latent, condition, batch["key"]) | drawn
        named = self._diffuse(latent, condition, tile, batch) | drawn
        weights = {name: getattr(self.config, f"w_{name}") for name in named}
        total = torch.stack([weights[name] * value for name, value in named.items()]).sum()
        return {"loss": total, **{name: value.detach() for name, value in named.items()}}

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate: the base's, and what starts from random weights."""
        unet = [weight for weight in self.generator.unet.parameters() if weight.requires_grad]
        new = list(self.generator.conditioner.parameters())
        return [{"params": unet, "lr": self.config.lr}, {"params": new, "lr": self.config.lr_rays}]

    def save(self, directory: str) -> None:
        """Write the directory that `Generator.load` reads."""
        self.generator.save(directory)

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Validation means, and `gap`: by which share a shuffled panorama is worse. 0: not used."""
        found = {name: float(value) for name, value in means.items() if value.ndim == 0}
        if "loss_correct" in found:
            found["gap"] = found["loss_shuffled"] / max(found["loss_correct"], 1e-12) - 1
        return found

    def _diffuse(
        self, latent: Tensor, condition: Condition, tile: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        model, config, keys = self.generator, self.config, batch["key"]

        def numbers(purpose: str) -> int:
            return draws.stream(config.fit.seed, int(batch["epoch"]), purpose)

        step = (draws.uniform(keys, numbers("step")) * len(model.noise.signal)).long()
        noise = draws.normal(keys, numbers("noise"), *model.latent)
        keep = draws.uniform(keys, numbers("drop")) >= config.drop
        noisy = model.noise.add(latent, noise, step)
        answer = model.predict(noisy, step, model.conditioner.dropped(condition, keep)).float()
        named = {"noise": F.mse_loss(answer, model.noise.target(latent, noise, step))}
        acts = int(self.steps) % config.image_every == 0 and (config.w_clip or config.w_vae)
        self.steps += 1
        if acts:
            order = draws.uniform(keys, numbers("image"))
            rows, strength = loss.image_rows(
                model.noise.signal[step], order, config.image_rows, config.image_signal
            )
            clean = model.noise.clean(noisy[rows], answer[rows], step[rows])
            strength = strength * config.image_every  # so that the mean over steps stays the same
            named |= loss.image_terms(model, self._lpips(), clean, tile[rows], strength)
        return named

    def _validate(self, latent: Tensor, condition: Condition, keys: Tensor) -> dict[str, Tensor]:
        """Noise error over VALIDATION, with the row's own panorama and with its neighbour's."""
        model = self.generator
        totals = {"loss_correct": latent.new_zeros(()), "loss_shuffled": latent.new_zeros(())}
        for share in VALIDATION:
            step = torch.full_like(keys, round(share * len(model.noise.signal)))
            stream = draws.stream(self.config.fit.seed, purpose=f"validation {share}")
            noise = draws.normal(keys, stream, *model.latent)
            noisy, target = (
                model.noise.add(latent, noise, step),
                model.noise.target(latent, noise, step),
            )
            for name, given in zip(totals, (condition, condition.rolled()), strict=True):
                error = F.mse_loss(model.predict(noisy, step, given).float(), target)
                totals[name] = totals[name] + error / len(VALIDATION)
        return {"loss": totals["loss_correct"], **totals}

    def _lpips(self) -> Lpips | None:
        return self.perceptual if self.config.w_vae else None


class RaysTask(nn.Module):
    """The rays alone, on the terms `map` and `contrast`: a cheap start for `GeneratorTask`."""

    def __init__(self, config: TrainGenerator, size: int) -> None:
        """`size` is the side of the map, in cells."""
        super().__init__()
        self.config, self.size = config, size
        self.rays = Rays(config.conditioning.channels)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `ground` and `aerial`."""
        drawn = self.rays.picture(self.rays(batch["ground"].float() / 255, self.size))
        named = loss.map_terms(drawn, batch["aerial"].float() / 255)
        total = self.config.w_map * named["map"] + self.config.w_contrast * named["contrast"]
        return {"loss": total, **{name: value.detach() for name, value in named.items()}}

    def groups(self) -> list[dict[str, Any]]:
        """All parameters, at `lr_rays`."""
        return [{"params": list(self.rays.parameters()), "lr": self.config.lr_rays}]

    def save(self, directory: str) -> None:
        """Write the rays' weights."""
        os.makedirs(directory, exist_ok=True)
        save_file(self.rays.state_dict(), os.path.join(directory, _RAYS))

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Validation means."""
        return {name: float(value) for name, value in means.items()}


def train(config: TrainGenerator) -> Result:
    """Fine-tune, publish the model to `config.output`, and log a run with a picture of samples.

    Raises:
        ValueError: a base model or the data is not there, or sizes do not fit.
    """
    config = _located(config)
    sizes = parts.sizes(
        config.diffusion, config.clip, config.conditioning.panorama_width, config.revision
    )
    data = training.cached(decode(ingest(config.data), sizes), config.fit)
    val = config.val and training.cached(decode(ingest(config.val), sizes), config.fit)
    with tracking.start("generate", config) as run:
        rays = ""
        if config.pretrain_rays and config.conditioning.geometry:
            rays = _pretrain(config, data, val, sizes)
        build = functools.partial(build_task, config, rays)
        result = training.fit(build, data, val, config.fit, run)
        output = training.publish(result, config.output)
        if config.samples:
            batch: Any = (val or data).take_batch(config.samples, batch_format="numpy")
            run.image("samples", sample_grid(Generator.load(output, engine.device()), batch))
    return result


def build_task(config: TrainGenerator, rays: str = "") -> GeneratorTask:
    """The task on its base models; `rays` is a directory that `RaysTask.save` wrote, or empty."""
    generator = Generator.base(config.diffusion, config.clip, config.conditioning, config.revision)
    if rays:
        generator.conditioner.rays.load_state_dict(load_file(os.path.join(rays, _RAYS)))
    lpips = Lpips.load(config.perceptual, config.perceptual_weights) if config.w_vae else None
    return GeneratorTask(generator, config, lpips)


def _pretrain(
    config: TrainGenerator, data: Dataset, val: Dataset | None, sizes: parts.Sizes
) -> str:
    """Train the rays alone; gives the local directory of their weights."""
    name = f"{config.fit.name}-rays" if config.fit.name else ""
    fit = dataclasses.replace(config.fit, epochs=config.pretrain_rays, name=name)
    result = training.fit(functools.partial(RaysTask, config, sizes.latent), data, val, fit)
    return storage.absolute(training.publish(result, f"{config.output}-rays"))


def _located(config: TrainGenerator) -> TrainGenerator:
    """The config with absolute local directories: workers have another working directory."""
    places = {name: getattr(config, name) for name in ("diffusion", "clip", "perceptual")}
    return dataclasses.replace(
        config, **{name: os.path.abspath(p) for name, p in places.items() if os.path.isdir(p)}
    )
