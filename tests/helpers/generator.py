"""A random generator of toy sizes, pairs to train it on, and its training step."""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cvmatch.data import images, schema
from cvmatch.generate.conditioning import Condition
from cvmatch.generate.diffusion import NoiseSchedule
from cvmatch.generate.losses import LPIPS
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Sampling, TrainGenerator
from cvmatch.generate.task import GeneratorTask
from cvmatch.nn import rng
from cvmatch.training import loop
from cvmatch.training.metrics import MeanMetrics
from cvmatch.training.settings import TrainConfig

Prediction = Literal["epsilon", "sample", "v_prediction"]

PANORAMA = (64, 256)

# bev_gain 1: tests give the map's weights themselves, or their own learning rate.
# low_freq_cells 0: they look at what the UNet draws.
CONDITIONING = Conditioning(panorama_width=256, bev_gain=1.0, low_freq_cells=0)


def clip_sizes() -> dict[str, Any]:
    """Sizes of a tiny CLIP vision tower."""
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 32,
    }


def make_vae(channels: tuple[int, ...], **sizes: Any) -> AutoencoderKL:
    """Build a VAE of these widths; diffusers annotates the tuples as of one element."""
    blocks: dict[str, Any] = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }
    return AutoencoderKL(**blocks, **sizes)


def write_base(directory: str, prediction: Prediction = "epsilon") -> None:
    """Write `diffusion/` and `clip/`, base models with random weights."""
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(os.path.join(directory, "diffusion", "unet"))
    vae = make_vae((8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=64)
    vae.save_pretrained(os.path.join(directory, "diffusion", "vae"))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    scheduler.save_pretrained(os.path.join(directory, "diffusion", "scheduler"))
    clip = os.path.join(directory, "clip")
    CLIPVisionModel(CLIPVisionConfig(**clip_sizes())).save_pretrained(clip)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    processor.save_pretrained(clip)


def make_generator(
    directory: str, conditioning: Conditioning = CONDITIONING, prediction: str = ""
) -> Generator:
    """Build a generator on what `write_base` wrote, with another prediction type if given."""
    diffusion, clip = (os.path.join(directory, name) for name in ("diffusion", "clip"))
    generator = Generator.base(diffusion, clip, conditioning)
    if prediction:
        generator.schedule.scheduler.register_to_config(prediction_type=prediction)
        generator.schedule = NoiseSchedule(generator.schedule.scheduler)
    return generator


def raw_batch(rows: int, first: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
    """Pairs of smooth noise, without what the frozen encoders see of them."""
    keys = [rng.row_key(f"{first + row:07d}") for row in range(rows)]
    key = torch.tensor(keys, dtype=torch.int64)
    pixels = rng.uniform(key, 7, 3, 8, 8)
    tile = F.interpolate(pixels, (64, 64), mode="bilinear")
    ground = F.interpolate(pixels, PANORAMA, mode="bilinear")
    view = (ground * 255).byte()
    # Mirrored, as geometry.rotate90_panorama does it: column 0 stays.
    return {
        "ground_view": view,
        "ground_view_mirrored": view.flip(-1).roll(1, -1),
        "aerial": (tile * 255).byte(),
        "aerial_mask": (tile[:, 0] * len(schema.PALETTE)).byte(),
        "key": key,
        "epoch": torch.tensor(epoch),
    }


def encode(generator: Generator, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the latents and CLIP tokens of the pairs and of the mirrored ones."""
    tile = batch["aerial"].float() / 255
    views = [batch[name].float() / 255 for name in ("ground_view", "ground_view_mirrored")]
    latents = [generator.encoders.encode_tile(part) for part in (tile, tile.flip(-1))]
    tokens = [generator.encoders.encode_panorama(view).clip_tokens for view in views]
    return batch | {"latent": torch.stack(latents, 1), "clip_tokens": torch.stack(tokens, 1)}


def make_batch(
    generator: Generator, rows: int, first: int = 0, epoch: int = 0
) -> dict[str, torch.Tensor]:
    """Return a training batch."""
    return encode(generator, raw_batch(rows, first, epoch))


def ground_of(rows: int, first: int = 0) -> torch.Tensor:
    """Return panoramas in [0, 1]."""
    return raw_batch(rows, first)["ground_view"].float() / 255


def condition_of(generator: Generator, ground: torch.Tensor) -> Condition:
    """Return the condition of panoramas."""
    return generator.condition(generator.encoders.encode_panorama(ground))


def make_task(
    generator: Generator,
    lpips: LPIPS | None = None,
    sampled: Any = (),
    **changes: Any,
) -> GeneratorTask:
    """Build the generator's task in training mode."""
    options: dict[str, Any] = {"conditioning": generator.conditioning, **changes}
    return GeneratorTask(generator, TrainGenerator(**options), lpips, sampled=sampled).train()


class Alone:
    """A worker that has these batches, and whose checkpoints go nowhere."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]]):
        self.batches = batches

    def shard(self, name):
        """Return the batches."""
        return SimpleNamespace(iter_torch_batches=lambda **options: iter(self.batches))

    def commit(self, metrics, directory):
        """Do nothing."""

    def latest(self):
        """Return no checkpoint."""

    def is_preempted(self):
        """Return False."""
        return False


def make_trainer(
    task: GeneratorTask, batches: Sequence[dict[str, torch.Tensor]] = (), **options: Any
) -> loop.Trainer:
    """Return the training loop's state of a task."""
    job = loop.TrainJob(
        build=lambda: task,
        fit=TrainConfig(shuffle=0, **options),
        rows=sum(len(batch["key"]) for batch in batches),
        validate=False,
        directory="",
        resume=0,
        until=1,
    )
    return loop.Trainer(job, Alone(batches))


def summarise(task: GeneratorTask, *batches: dict[str, torch.Tensor]) -> dict:
    """Validate a task on batches."""
    means = MeanMetrics()
    with torch.no_grad():
        for batch in batches:
            means.add(task(batch), len(batch["key"]))
    return task.summary(means.reduce(1))


def sample(generator: Generator, rows: int = 2, first: int = 0, **options: Any) -> torch.Tensor:
    """Sample the synthetic aerials of the first panoramas."""
    keys = raw_batch(rows, first)["key"]
    sampling = Sampling(**{"num_inference_steps": 3, **options})
    return generator.eval().sample(ground_of(rows, first), keys, sampling)


def make_informative(generator: Generator) -> None:
    """Give the random toy a condition that matters, as training would."""
    with torch.no_grad():
        generator.conditioner.project.weight.mul_(20)
        generator.unet.conv_in.weight[:, 4:] += 0.05
        generator.conditioner.bev.proj_out.weight.mul_(20)


def make_rows() -> dict[str, np.ndarray]:
    """Return three rows of PAIRS: a good one, a truncated panorama, and one with an error."""
    batch = raw_batch(3)
    ground = [images.encode(picture.permute(1, 2, 0).numpy()) for picture in batch["ground_view"]]
    aerial = [images.encode(picture.permute(1, 2, 0).numpy()) for picture in batch["aerial"]]
    ground[1] = ground[1][:100]  # truncated
    return {
        schema.PAIR_ID: np.array(["0000000", "0000001", "0000002"], dtype=object),
        schema.GROUND: np.array(ground, dtype=object),
        schema.AERIAL: np.array(aerial, dtype=object),
        schema.CLASSES: np.full(3, None, dtype=object),
        schema.ERROR: np.array([None, None, "ingest: no tile"], dtype=object),
    }
