"""Fine-tune the generator: pairs -> a published model directory."""

import dataclasses
import functools
import os

from ray.data import Dataset

from cvmatch.data import manifest, schema, storage, tables
from cvmatch.data.pairs import PairDataset
from cvmatch.generate.batches import read_latents
from cvmatch.generate.encoders import check_base_models, read_sizes
from cvmatch.generate.latent_cache import cache_latents
from cvmatch.generate.losses import LPIPS
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import TrainGenerator
from cvmatch.generate.task import BEVTask, GeneratorTask, load_bev
from cvmatch.nn import hub, rng
from cvmatch.runtime import session, tracking
from cvmatch.training import launch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.held_out import choose_held_out


def train(config: TrainGenerator) -> TrainResult:
    """Fine-tune, publish the model to `config.output`, and log a run with images of samples.

    Raises:
        ValueError: a base model or the data is not there, or sizes do not fit.
    """
    launch.preflight(config.fit)
    config = with_absolute_paths(config)
    _check_base_models(config)
    session.start()
    with tracking.start("generate", config) as run:
        pairs = PairDataset.open(config.data)
        held_out = PairDataset.open(config.val.ingest(config.data)) if config.val else None
        data = read_training_pairs(config, pairs)
        val = held_out and read_pairs(config, held_out)
        sampled = choose_sampled(config, held_out) if held_out else ()
        provenance = manifest.digest([part.fingerprint for part in (pairs, held_out) if part])
        bev = _pretrain_bev(config, data, val, provenance) if config.pretrain_bev else ""
        build = functools.partial(build_task, config, bev, sampled)
        result = launch.train(build, data, val, config.fit, run, input_fingerprint=provenance)
        launch.publish(result, config.output)
    return result


def measure(config: TrainGenerator, checkpoint: str) -> dict[str, float]:
    """Measure a training's checkpoint on the pairs of `config.val`, others than its own or not.

    Returns:
        The `val/...` of an epoch.

    Raises:
        ValueError: a base model or the data is not there.
    """
    config = with_absolute_paths(config)
    assert config.val is not None
    session.start()
    held_out = PairDataset.open(config.val.ingest(config.data))
    bev = _bev_directory(config) if config.pretrain_bev else ""
    build = functools.partial(build_task, config, bev, choose_sampled(config, held_out))
    return launch.measure(build, read_pairs(config, held_out), config.fit, checkpoint)


def build_task(
    config: TrainGenerator, bev: str = "", sampled: tuple[int, ...] = ()
) -> GeneratorTask:
    """Build the task.

    Args:
        config: the settings.
        bev: a directory that `BEVTask.save` wrote, or empty.
        sampled: keys of the validation rows that are sampled, see `choose_sampled`.
    """
    generator = Generator.base(config.diffusion, config.clip, config.conditioning)
    if bev:
        load_bev(generator.conditioner.bev, bev)
    lpips = LPIPS.load(config.lpips_vgg) if config.lpips_weight else None
    return GeneratorTask(generator, config, lpips, config.fit.seed, sampled)


def read_pairs(config: TrainGenerator, pairs: PairDataset, mirror: bool = False) -> Dataset:
    """Encode pairs, unless the latent cache has them, and read them as training batches."""
    rows = read_latents(_encode(config, pairs, mirror))
    return launch.cache_rows(rows, config.fit)


def read_training_pairs(config: TrainGenerator, pairs: PairDataset) -> Dataset:
    """Encode pairs, unless the latent cache has them, and read all but `choose_held_out`."""
    directory = _encode(config, pairs, config.mirror)
    left_out = choose_held_out(_read_ids(directory))
    return launch.cache_rows(read_latents(directory, left_out), config.fit)


def choose_sampled(config: TrainGenerator, pairs: PairDataset) -> tuple[int, ...]:
    """Choose the keys of the validation pairs that are sampled: as good as at random."""
    keys = map(rng.row_key, _read_ids(_encode(config, pairs, mirror=False)))
    return tuple(sorted(keys)[: config.validation_images])


def _read_ids(directory: str) -> list[str]:
    """Read the ids of the good rows of a latent cache."""
    rows = map(schema.good_rows, tables.batches(directory, [schema.PAIR_ID, schema.ERROR]))
    return [one for table in rows for one in table[schema.PAIR_ID].to_pylist()]


def _encode(config: TrainGenerator, pairs: PairDataset, mirror: bool) -> str:
    encoding = config.encoding(data=pairs.config, mirror=mirror)
    return cache_latents(encoding, pairs, launch.actors(config.fit, 16, "Actors that encode pairs"))


def with_absolute_paths(config: TrainGenerator) -> TrainGenerator:
    """Return the config with absolute local paths: workers have another working directory."""
    vgg = os.path.abspath(config.lpips_vgg)
    return dataclasses.replace(
        config,
        diffusion=hub.absolute_or_hub_id(config.diffusion),
        clip=hub.absolute_or_hub_id(config.clip),
        lpips_vgg=vgg if os.path.exists(vgg) else config.lpips_vgg,
    )


def _check_base_models(config: TrainGenerator) -> None:
    """Check that all base models can be had, before Ray starts and pairs are read."""
    hub.check_all(
        lambda: check_base_models(config.diffusion, config.clip), lambda: _check_lpips(config)
    )


def _check_lpips(config: TrainGenerator) -> None:
    if not config.lpips_weight:
        return
    try:
        LPIPS.load(config.lpips_vgg)
    except ValueError as error:
        raise ValueError(f"--lpips-vgg {config.lpips_vgg}: {error}") from error


def _pretrain_bev(
    config: TrainGenerator, data: Dataset, val: Dataset | None, provenance: str
) -> str:
    """Train the BEV network alone; returns the local directory of its weights."""
    sizes = read_sizes(config.diffusion, config.clip, config.conditioning.panorama_width)
    name = f"{config.fit.name}-bev" if config.fit.name else ""
    # `best` is a metric of the generator's, which this task may not have.
    fit = dataclasses.replace(config.fit, epochs=config.pretrain_bev, name=name, best="")
    build = functools.partial(BEVTask, config, sizes.latent, fit.seed)
    result = launch.train(build, data, val, fit, input_fingerprint=provenance)
    return launch.publish(result, _bev_directory(config))


def _bev_directory(config: TrainGenerator) -> str:
    return storage.absolute(f"{config.output}-bev")
