"""Train the matcher: synthesized pairs -> a published model that names its training ids."""

import dataclasses
import functools

from ray.data import Dataset
from ray.train import Result

from cvmatch.data import manifest
from cvmatch.match.batches import decode, pair_ids, synthesized
from cvmatch.match.hard_negatives import mined
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.task import MatcherTask
from cvmatch.nn import backbones, rng
from cvmatch.runtime import session, tracking
from cvmatch.runtime.output_directory import made_from
from cvmatch.training import launch
from cvmatch.training.task import Order


def train(config: TrainMatcher) -> Result:
    """Train, publish the model to `config.output`, and log a run.

    Raises:
        FileNotFoundError: no synthesized rows there.
        ValueError: a backbone is not there, no row is without error, or validation pairs are
            among the training pairs.
    """
    launch.preflight(config.fit)
    config = with_absolute_paths(config)
    rows = synthesized(config.pairs, config.joint)
    decoded = functools.partial(_decoded, config)
    val = decoded(synthesized(config.val, config.joint)) if config.val else None
    ids = pair_ids(config.pairs)
    if config.val and (both := set(ids).intersection(pair_ids(config.val))):
        raise ValueError(
            f"train_matcher: expected validation pairs apart from training, got {len(both)} "
            f"in both {config.pairs} and {config.val}, such as {min(both)}. Pass another --val."
        )
    order = _order(config, rows) if config.mine_every else None
    with tracking.start("match", config) as run:
        build = functools.partial(build_task, config, ids)
        rows_of = manifest.digest([made_from(one) for one in (config.pairs, config.val) if one])
        result = launch.fit(build, decoded(rows), val, config.fit, run, order, rows_of)
        launch.publish(result, config.output)
    return result


def with_absolute_paths(config: TrainMatcher) -> TrainMatcher:
    """The config with absolute local paths of the backbone: workers have another directory."""
    name, weights = backbones.resolve_paths(config.tower, config.weights)
    return dataclasses.replace(config, tower=name, weights=weights)


def build_task(config: TrainMatcher, ids: tuple[str, ...] = ()) -> MatcherTask:
    """The task on its backbones; `ids` of the training pairs go into the model directory."""
    ground, aerial, classes = (_tower(config) for _ in range(3))
    model_config = MatcherConfig(
        ground=ground.spec,
        aerial=aerial.spec,
        classes=classes.spec,
        shared=config.shared,
        alone=not config.joint,
        view=config.view,
        panorama=config.panorama,
        polar=config.polar,
        square=config.square,
        hidden=config.hidden,
    )
    model = Matcher(model_config, (ground, aerial, classes))
    return MatcherTask(model, config, ids, config.fit.seed)


def _order(config: TrainMatcher, rows: Dataset) -> Order:
    """The training rows, near ones together."""
    session.preflight(config.mine_pool)

    def nearby(model: str, epoch: int) -> Dataset:
        seed = rng.fold_in(config.fit.seed, epoch, "near") % 2**32
        return _decoded(config, mined(rows, model, config.mine_pool, seed))

    return Order(config.mine_every, nearby)


def _decoded(config: TrainMatcher, rows: Dataset) -> Dataset:
    return decode(rows, config.panorama, config.square)


def _tower(config: TrainMatcher) -> backbones.Tower:
    return backbones.tower(config.tower, config.weights, config.grid, config.dim)
