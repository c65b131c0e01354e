"""Fine-tune SegFormer on aerial pictures and their class maps."""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from ray.data import Dataset

from cvmatch.data import images, manifest, row_files, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.nn import hub
from cvmatch.runtime import session, tracking
from cvmatch.runtime.streams.output_directory import read_provenance
from cvmatch.segment.batches import Preprocess, decode, decode_synthesized
from cvmatch.segment.model import Segmenter, check_base
from cvmatch.segment.settings import TrainSegmenter
from cvmatch.segment.task import SegmenterTask, class_weights
from cvmatch.training import launch
from cvmatch.training.checkpoints import TrainResult
from cvmatch.training.settings import TrainConfig

COUNTED = 256
"""Training rows whose pixels are counted for the class weights."""

MOST = 0.5
"""Share of labelled pixels, in [0, 1], below which a training warns."""

SHOWN = 6
"""Pictures in the image of masks that a run logs."""

_log = logging.getLogger(__name__)


def train(config: TrainSegmenter) -> TrainResult:
    """Train on the rows of `config.data` and publish the model at `config.output`.

    Raises:
        FileNotFoundError: no finished output of cvmatch synthesize at `config.synthesized`.
        ValueError: no row has a class map, the synthesized rows are of another split, or the base
            model cannot be had.
    """
    launch.preflight(config.fit)
    check_synthesized(config)
    preprocess = Preprocess(size=config.size, num_classes=config.num_classes)
    check_base(config.base, preprocess)
    session.start()
    pairs = PairDataset.open(config.data)
    held_out = config.held_out and PairDataset.open(config.held_out.ingest(config.data))
    rows = read_training_rows(config, pairs, preprocess)
    val = held_out and read_labelled(held_out, preprocess, config.fit)
    weights = None
    if config.class_weights:
        masks = [row["aerial_mask"] for row in rows.select_columns("aerial_mask").take(COUNTED)]
        weights = class_weights(np.stack(masks), config.num_classes)
    build = functools.partial(
        _build_task, config, hub.absolute_or_hub_id(config.base), preprocess, weights
    )
    with tracking.start("segment", config) as run:
        rows_of = _input_fingerprint(config, [pairs, *([held_out] if held_out else [])])
        result = launch.train(build, rows, val, config.fit, run, input_fingerprint=rows_of)
        launch.publish(result, config.output)
        run.image("masks", masks_image(Segmenter.load(config.output), (val or rows).take(SHOWN)))
    return result


def measure(config: TrainSegmenter, checkpoint: str) -> dict[str, float]:
    """Measure a training's checkpoint on the rows of `config.val`, others than its own or not.

    Returns:
        The `val/...` of an epoch; of the losses, those without class weights.

    Raises:
        ValueError: no row has a class map, or the base model cannot be had.
    """
    assert config.held_out is not None
    session.start()
    preprocess = Preprocess(size=config.size, num_classes=config.num_classes)
    held_out = PairDataset.open(config.held_out.ingest(config.data))
    val = read_labelled(held_out, preprocess, config.fit)
    base = hub.absolute_or_hub_id(config.base)
    build = functools.partial(_build_task, config, base, preprocess, None)
    return launch.measure(build, val, config.fit, checkpoint)


def read_labelled(pairs: PairDataset, preprocess: Preprocess, fit: TrainConfig) -> Dataset:
    """Decode the rows with a class map to `aerial`, `aerial_mask` and `key`.

    Raises:
        ValueError: there is none, or no pixel of any has a class.
    """
    decoded = launch.cache_rows(_map_blocks(pairs.rows(), decode, preprocess=preprocess), fit)
    if not decoded.take(1):
        data = pairs.config
        raise ValueError(
            f"{data.root} ({data.split}): expected rows with a class map, got none. The segmenter "
            "learns from segmap/*.png (pairs of your own: the column classes); official CVUSA has "
            "none, the published subset has."
        )
    masks = decoded.select_columns("aerial_mask").iter_rows()
    check_labels((row["aerial_mask"] for row in masks), pairs.config)
    return decoded


def check_labels(masks: Iterable[UInt8[np.ndarray, "size size"]], data: Ingest) -> None:
    """Check that class maps say something: COUNTED of them, or more until a pixel has a class.

    A warning says so where most pixels have none.

    Args:
        masks: Class maps.
        data: Where they are from.

    Raises:
        ValueError: no pixel of any map has a class.
    """
    maps = pixels = labelled = 0
    for mask in masks:
        maps += 1
        pixels += mask.size
        labelled += int((mask != schema.IGNORE).sum())
        if labelled and maps >= COUNTED:
            break
    colours = dict(zip(schema.LABELS, schema.PALETTE, strict=True))
    found = (
        f"{data.root} ({data.split}): of {maps} class maps, {labelled / max(1, pixels):.1%} of the "
        f"pixels have one of the colours {colours}"
    )
    if not labelled:
        raise ValueError(f"{found}: nothing to learn from, or to measure by. Mend the maps.")
    if labelled < MOST * pixels:
        _log.warning("%s: the other pixels are ignored.", found)


def check_synthesized(config: TrainSegmenter) -> None:
    """Check that the rows at `config.synthesized` are of the split that is trained on.

    Raises:
        FileNotFoundError: no finished output of cvmatch synthesize there.
        ValueError: they are of another split.
    """
    if not config.synthesized:
        return
    source = manifest.read(config.synthesized)["config"]
    split = source.get("data", {}).get("split")
    if split != config.data.split:
        raise ValueError(
            f"{config.synthesized}: expected rows of the split {config.data.split!r} that is "
            f"trained on, got {split!r}. Pass the output of cvmatch synthesize for that split."
        )


def read_training_rows(
    config: TrainSegmenter, pairs: PairDataset, preprocess: Preprocess
) -> Dataset:
    """Read labelled rows of `config.data`, and between them those of `config.synthesized`.

    Raises:
        ValueError: no row of `config.data` has a class map.
    """
    if not config.synthesized:
        return read_labelled(pairs, preprocess, config.fit)
    columns = [schema.PAIR_ID, schema.SYNTHETIC, schema.CLASSES, schema.ERROR]
    synthetic = row_files.read(config.synthesized, columns, needed=columns)
    share = config.synthesized_share
    options = {"preprocess": preprocess, "share": share, "seed": config.fit.seed}
    synthetic = _map_blocks(synthetic, decode_synthesized, **options)
    true = read_labelled(pairs, preprocess, config.fit)
    # mix and not union, which would put them all at the end of an epoch.
    return launch.cache_rows(true.mix(synthetic, weights=[1.0, share]), config.fit)


def masks_image(segmenter: Segmenter, rows: list[dict]) -> UInt8[np.ndarray, "h w 3"]:
    """Stack rows to one picture: tile, true classes, predicted classes."""
    tiles = np.stack([row["aerial"] for row in rows])
    predicted = segmenter.predict(torch.from_numpy(tiles)).numpy()
    strips = [
        np.hstack([tile.transpose(1, 2, 0), *map(images.colours_of, (row["aerial_mask"], ids))])
        for tile, row, ids in zip(tiles, rows, predicted, strict=True)
    ]
    return np.vstack(strips)


def _map_blocks(rows: Dataset, step: Callable, **arguments: Any) -> Dataset:
    """Map `step` over whole blocks."""
    return rows.map_batches(step, fn_kwargs=arguments, batch_format="numpy", batch_size=None)


def _input_fingerprint(config: TrainSegmenter, pairs: list[PairDataset]) -> str:
    """Hash the data, and what the synthetic aerials were made from."""
    synthesized = config.synthesized and read_provenance(config.synthesized)
    return manifest.digest([[one.fingerprint for one in pairs], synthesized])


def _build_task(
    config: TrainSegmenter, base: str, preprocess: Preprocess, weights: list[float] | None
) -> SegmenterTask:
    return SegmenterTask(Segmenter.from_base(base, preprocess), config, weights)
