"""Train the matcher: synthesized pairs -> a published model that names its training ids."""

import dataclasses
import functools

from ray.data import Dataset

from cvmatch.data import manifest
from cvmatch.match.batches import decode, read_pair_ids, read_pairs
from cvmatch.match.hard_negatives import order_hard_negatives
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.task import MatcherTask
from cvmatch.nn import backbones, rng
from cvmatch.runtime import session, tracking
from cvmatch.runtime.output_directory import read_provenance
from cvmatch.training import launch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.task import EpochOrder


def train(config: TrainMatcher) -> TrainResult:
    """Train, publish the model to `config.output`, and log a run.

    Raises:
        FileNotFoundError: no synthesized rows there.
        ValueError: a backbone is not there, no row is without error, or validation pairs are
            among the training pairs.
    """
    launch.preflight(config.fit)
    config = with_absolute_paths(config)
    _check_tower(config)
    session.start()
    rows = read_pairs(config.pairs, config.joint)
    val = _decode(config, read_pairs(config.val, config.joint)) if config.val else None
    ids = read_pair_ids(config.pairs)
    if config.val and (both := set(ids).intersection(read_pair_ids(config.val))):
        raise ValueError(
            f"train-matcher: expected validation pairs apart from training, got {len(both)} "
            f"in both {config.pairs} and {config.val}, such as {min(both)}. Pass another --val."
        )
    order = _hard_negative_order(config, rows) if config.hard_negatives_every else None
    with tracking.start("match", config) as run:
        build = functools.partial(build_task, config, ids)
        rows_of = manifest.digest(
            [read_provenance(one) for one in (config.pairs, config.val) if one]
        )
        result = launch.train(build, _decode(config, rows), val, config.fit, run, order, rows_of)
        launch.publish(result, config.output)
    return result


def with_absolute_paths(config: TrainMatcher) -> TrainMatcher:
    """Make local paths of the backbone absolute: workers have another directory."""
    name, weights = backbones.resolve_paths(config.tower, config.weights)
    return dataclasses.replace(config, tower=name, weights=weights)


def _check_tower(config: TrainMatcher) -> None:
    """Check that the backbone can be had, before Ray starts and rows are read."""
    try:
        backbones.load_tower(config.tower, config.weights, config.grid)
    except ValueError as error:
        raise ValueError(f"--tower {config.tower}: {error}") from error


def build_task(config: TrainMatcher, ids: tuple[str, ...] = ()) -> MatcherTask:
    """Build the task on its backbones; `ids` of the training pairs go into the model directory."""
    ground, aerial, mask = (
        backbones.load_tower(config.tower, config.weights, config.grid) for _ in range(3)
    )
    model_config = MatcherConfig(
        ground=ground.spec,
        aerial=aerial.spec,
        mask=mask.spec,
        ground_only=not config.joint,
        **config.shape,
    )
    model = Matcher(model_config, (ground, aerial, mask))
    return MatcherTask(model, config, ids, config.fit.seed)


def _hard_negative_order(config: TrainMatcher, rows: Dataset) -> EpochOrder:
    """Order the training rows so that near ones share batches."""
    # The workers of the training have ended by then, so their GPUs are free.
    pool = launch.actors(config.fit, 32, "Actors that look for hard negatives")

    def reorder(model: str, epoch: int) -> Dataset:
        seed = rng.fold_in(config.fit.seed, epoch, "near") % 2**32
        return _decode(config, order_hard_negatives(rows, model, pool, seed))

    return EpochOrder(config.hard_negatives_every, reorder)


def _decode(config: TrainMatcher, rows: Dataset) -> Dataset:
    return decode(rows, config.panorama, config.tile_size)
