"""Fine-tune the generator: pairs -> a published model directory."""

import dataclasses
import functools
import os

from ray.data import Dataset
from safetensors.torch import load_file

from cvmatch.data import manifest, storage
from cvmatch.data.pairs import PairDataset
from cvmatch.generate import pretrained
from cvmatch.generate.batches import Sizes, decode
from cvmatch.generate.bev_task import FILE, RaysTask
from cvmatch.generate.latent_cache import encode
from cvmatch.generate.latent_rows import encoded
from cvmatch.generate.model import Generator
from cvmatch.generate.perceptual import Lpips
from cvmatch.generate.settings import Encode, TrainGenerator
from cvmatch.generate.task import GeneratorTask
from cvmatch.nn import backbones, hub
from cvmatch.runtime import tracking
from cvmatch.training import launch
from cvmatch.training.checkpoints import TrainResult


def train(config: TrainGenerator) -> TrainResult:
    """Fine-tune, publish the model to `config.output`, and log a run with a picture of samples.

    Raises:
        ValueError: a base model or the data is not there, or sizes do not fit.
    """
    launch.preflight(config.fit)
    config = located(config)
    sizes = pretrained.sizes(
        config.diffusion, config.clip, config.conditioning.panorama_width, config.revision
    )
    with tracking.start("generate", config) as run:
        pairs = PairDataset.open(config.data)
        held_out = config.val and PairDataset.open(config.val)
        data = training_rows(config, pairs, sizes, config.turns, config.mirror)
        val = held_out and training_rows(config, held_out, sizes, turns=False, mirror=False)
        rows_of = manifest.digest([one.fingerprint for one in (pairs, held_out) if one])
        rays = ""
        if config.pretrain_rays and config.conditioning.geometry:
            rays = _pretrain(config, data, val, sizes, rows_of)
        build = functools.partial(build_task, config, rays)
        result = launch.train(build, data, val, config.fit, run, input_fingerprint=rows_of)
        launch.publish(result, config.output)
    return result


def build_task(config: TrainGenerator, rays: str = "") -> GeneratorTask:
    """The task on its base models; `rays` is a directory that `RaysTask.save` wrote, or empty."""
    generator = Generator.base(
        config.diffusion, config.clip, config.conditioning, config.revision, config.prediction
    )
    if rays:
        generator.conditioner.rays.load_state_dict(load_file(os.path.join(rays, FILE)))
    lpips = Lpips.load(config.perceptual, config.perceptual_weights) if config.w_vae else None
    return GeneratorTask(generator, config, lpips, config.fit.seed)


def training_rows(
    config: TrainGenerator, pairs: PairDataset, sizes: Sizes, turns: bool, mirror: bool
) -> Dataset:
    """Pairs as the tensors of `GeneratorTask`."""
    if config.encode == "live":
        return launch.cache_rows(decode(pairs.rows(), sizes), config.fit)
    directory = encode(
        Encode(
            data=pairs.config,
            diffusion=config.diffusion,
            revision=config.revision,
            clip=config.clip,
            conditioning=config.conditioning,
            turns=turns,
            mirror=mirror,
            output=config.encoded,
            pool=config.encode_pool,
        ),
        pairs,
    )
    return launch.cache_rows(encoded(directory), config.fit)


def _pretrain(
    config: TrainGenerator,
    data: Dataset,
    val: Dataset | None,
    sizes: pretrained.Sizes,
    rows_of: str,
) -> str:
    """Train the rays alone; gives the local directory of their weights."""
    name = f"{config.fit.name}-rays" if config.fit.name else ""
    # `best` is a measure of the generator's, which the rays may not have.
    fit = dataclasses.replace(config.fit, epochs=config.pretrain_rays, name=name, best="")
    result = launch.train(
        functools.partial(RaysTask, config, sizes.latent, config.conditioning.channels, fit.seed),
        data,
        val,
        fit,
        input_fingerprint=rows_of,
    )
    return storage.absolute(launch.publish(result, f"{config.output}-rays"))


def located(config: TrainGenerator) -> TrainGenerator:
    """The config with absolute local paths: workers have another working directory."""
    perceptual, weights = backbones.resolve_paths(config.perceptual, config.perceptual_weights)
    return dataclasses.replace(
        config,
        diffusion=hub.absolute_or_hub_id(config.diffusion),
        clip=hub.absolute_or_hub_id(config.clip),
        perceptual=perceptual,
        perceptual_weights=weights,
    )
