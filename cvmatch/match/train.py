"""Train the matcher: synthesized pairs -> a published model that names its training ids."""

import dataclasses
import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from ray.data import Dataset
from torch import Tensor

from cvmatch.data import manifest
from cvmatch.match.batches import decode, read_pair_ids, read_pairs
from cvmatch.match.hard_negatives import order_hard_negatives
from cvmatch.match.heads.branches import BranchHeads, FusionWeights, fit_weights
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.task import MatcherTask
from cvmatch.nn import backbones, rng
from cvmatch.runtime import hardware, session, tracking
from cvmatch.runtime.streams.output_directory import read_provenance
from cvmatch.training import launch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.held_out import choose_held_out, select_pairs
from cvmatch.training.task import EpochOrder

FUSION_PAIRS = 512
"""Validation pairs at most that the branches' weights are fitted on."""

FUSION_TILES = 2048
"""Training tiles at most among which the held-out pairs' own have to be found: few pairs alone are
too easy, and say little."""

_log = logging.getLogger(__name__)


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
    rows = read_pairs(config.pairs, config.tower_letters)
    val = _decode(config, read_pairs(config.val, config.letters)) if config.val else None
    ids = read_pair_ids(config.pairs)
    _check_disjoint(config, ids)
    fits = config.score == "sum" and len(config.branches) > 1
    held_out = choose_held_out(ids) if fits and val is None else []
    rows = select_pairs(rows, held_out, False) if held_out else rows
    order = _hard_negative_order(config, rows) if config.hard_negatives_every else None
    with tracking.start("match", config) as run:
        build = functools.partial(build_task, config, ids)
        rows_of = manifest.digest(
            [read_provenance(one) for one in (config.pairs, config.val) if one]
        )
        result = launch.train(build, _decode(config, rows), val, config.fit, run, order, rows_of)
        launch.publish(result, config.output)
        if fits and val is not None:
            fit_fusion(config.output, val)
        elif held_out:
            whole = read_pairs(config.pairs, config.letters)
            pairs = _decode(config, select_pairs(whole, held_out, True))
            fit_fusion(config.output, pairs, _decode(config, rows))
    return result


def measure(config: TrainMatcher, checkpoint: str) -> dict[str, float]:
    """Measure a training's checkpoint on the rows at `config.val`, others than its own or not.

    Returns:
        The `val/...` of an epoch.

    Raises:
        FileNotFoundError: no synthesized rows there.
        ValueError: some of them were trained on.
    """
    config = with_absolute_paths(config)
    session.start()
    _check_disjoint(config, read_pair_ids(config.pairs))
    val = _decode(config, read_pairs(config.val, config.letters))
    return launch.measure(functools.partial(build_task, config), val, config.fit, checkpoint)


@torch.inference_mode()
def fit_fusion(directory: str, pairs: Dataset, others: Dataset | None = None) -> FusionWeights:
    """Fit the weights of a published model's branches, and save them.

    Args:
        directory: of the model.
        pairs: decoded rows that neither the model nor the generator has learned from.
        others: decoded rows whose tiles the pairs' own have to be told from, too.
    """
    model = Matcher.load(directory, hardware.device())
    heads = model.heads
    assert isinstance(heads, BranchHeads)
    queries: list[dict[str, Tensor]] = []
    tiles: list[dict[str, Tensor]] = []
    for batch in _batches(pairs, FUSION_PAIRS, model):
        synthetic = batch["synthetic"].float() / 255 if "synthetic" in batch else None
        query = model.query_features(batch["ground"].float() / 255, synthetic)
        queries.append(heads.query_parts(query))
        tiles.append(heads.tile_parts(model.tile_features(batch["aerial"].float() / 255)))
    for batch in _batches(others, FUSION_TILES, model) if others else ():
        tiles.append(heads.tile_parts(model.tile_features(batch["aerial"].float() / 255)))
    cosines: dict[str, Tensor] = {
        branch: torch.cat([part[branch] for part in queries])
        @ torch.cat([part[branch] for part in tiles]).T
        for branch in heads.branches
    }
    weights = fit_weights(cosines)
    weights.save(directory)
    _log.info("%s: weights of the branches: %s", directory, weights.weights)
    return weights


def _batches(rows: Dataset, count: int, model: Matcher) -> Iterable[dict[str, Any]]:
    return rows.limit(count).iter_torch_batches(batch_size=32, device=model.device)


def with_absolute_paths(config: TrainMatcher) -> TrainMatcher:
    """Make local paths of the backbone absolute: workers have another directory."""
    name, weights = backbones.resolve_paths(config.tower, config.weights)
    return dataclasses.replace(config, tower=name, weights=weights)


def _check_disjoint(config: TrainMatcher, ids: Iterable[str]) -> None:
    """Check that no validation pair is among the training pairs, `ids`."""
    if config.val and (both := set(ids).intersection(read_pair_ids(config.val))):
        raise ValueError(
            f"train-matcher: expected validation pairs apart from training, got {len(both)} "
            f"in both {config.pairs} and {config.val}, such as {min(both)}. Pass another --val."
        )


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
        ground=ground.spec, aerial=aerial.spec, mask=mask.spec, **config.shape
    )
    model = Matcher(model_config, (ground, aerial, mask))
    return MatcherTask(model, config, ids, config.fit.seed, config.fit.epochs)


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
