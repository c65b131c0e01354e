"""A segmenter fine-tuned within ten CPU minutes: mIoU on unseen tiles, true and synthetic."""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _harness import Bench, parse_flags, write_results
from ray.data import Dataset

from cvmatch.data import schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.evaluate import generation
from cvmatch.evaluate.results import SegmentationResult
from cvmatch.generate.infer import generate
from cvmatch.generate.settings import Generate
from cvmatch.runtime import progress, session
from cvmatch.runtime.settings import Pool
from cvmatch.segment.infer import segment
from cvmatch.segment.settings import Segment, TrainSegmenter
from cvmatch.segment.train import train
from cvmatch.training.settings import TrainConfig

BUDGET = 10.0
"""CPU minutes that the training may take."""

REQUIRED = 0.60
"""mIoU on true aerials that it has to reach."""


@dataclass(frozen=True, kw_only=True)
class SegmenterBench(Bench):
    """Fine-tune the toy SegFormer, and compare its maps of held-out tiles with the true ones."""

    data: str = ""
    """Data set with class maps and both splits; empty: a world is made for the run."""
    generator: str = ""
    """Directory of a trained generator, for maps of synthetic aerials; empty: they are left out."""
    pairs: int = 0
    """Training pairs; 0: 2,000, quick 480."""
    held_out: int = 0
    """Pairs of the split `val`; 0: 500, quick 160."""
    epochs: int = 0
    """Passes over the training pairs; 0: 12, which takes six to eight CPU minutes, quick 8."""
    seed: int = 0
    """Seed of the world and of the training."""


def make_config(root: str, pairs: int, epochs: int, seed: int, at: str) -> TrainSegmenter:
    """What differs from the reference run: a model and pictures for a laptop, no validation."""
    return TrainSegmenter(
        data=Ingest(root=root, split="train", limit=pairs),
        base=base_models.SEGFORMER,
        size=128,
        lr=1e-3,
        lr_head=3e-3,
        dice_weight=0.5,
        output=f"{at}/segmenter",
        fit=TrainConfig(epochs=epochs, batch=6, seed=seed, storage=f"{at}/runs", cache=True),
    )


def train_timed(config: TrainSegmenter) -> float:
    """Train; gives the CPU minutes of this process, on one thread as a Ray actor has."""
    torch.set_num_threads(1)
    begin = time.process_time()
    train(config)
    return (time.process_time() - begin) / 60


def measure(name: str, rows: Dataset, count: int) -> SegmentationResult:
    """`generation.measure_segmentation` of segmented rows."""
    seen = []

    def noted() -> Iterator[dict[str, Any]]:
        for row in rows.iter_rows():
            seen.append(row[schema.PAIR_ID])
            yield row

    with progress.watch(name, count, lambda: len(seen)):
        scores = generation.measure_segmentation(noted())
    assert scores is not None, "no row has both maps"
    return scores


def compare(held_out: Ingest, model: str, generator: str) -> dict[str, SegmentationResult]:
    """Scores of the maps of true aerials, without and with flip, and of synthetic ones."""
    rows = PairDataset.open(held_out).rows()
    count = PairDataset.open(held_out).count
    found = {}
    for flip in (False, True):
        true = Segment(model=model, source="aerial", flip=flip, pool=Pool(batch=32))
        name = f"true aerials{', flip' if flip else ''}"
        found[name] = measure(name, segment(rows, true), count)
    if generator:
        drawn = generate(rows, Generate(model=generator))
        found["synthetic aerials"] = measure(
            "synthetic aerials", segment(drawn, Segment(model=model)), count
        )
    return found


def make_row(name: str, scores: SegmentationResult) -> dict[str, Any]:
    """A row of the table."""
    return {
        "pictures": name,
        "mIoU": scores.miou,
        "mIoU, shuffled": scores.miou_shuffled,
        **scores.iou,
        "accuracy": scores.accuracy,
        "ignored": scores.ignored,
    }


def make_figures(minutes: float, found: dict[str, SegmentationResult]) -> dict[str, float]:
    """The figures of the last line."""
    true = found["true aerials"]
    figures = {"cpu_minutes": minutes, "miou": true.miou, "accuracy": true.accuracy}
    figures |= {f"iou.{name.replace(' ', '_')}": iou for name, iou in true.iou.items()}
    figures |= {"ignored": true.ignored, "miou_flip": found["true aerials, flip"].miou}
    if drawn := found.get("synthetic aerials"):
        gain = drawn.miou - drawn.miou_shuffled
        figures |= {"synthetic.miou": drawn.miou, "synthetic.above_shuffled": gain}
    return figures


def main(bench: SegmenterBench) -> None:
    """Make a world where none is given, train, compare."""
    pairs = bench.pairs or (480 if bench.quick else 2000)
    count = bench.held_out or (160 if bench.quick else 500)
    epochs = bench.epochs or (8 if bench.quick else 12)
    session.start(logical_cpus=4)
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        root = bench.data or f"{at}/world"
        if not bench.data:
            make_world(
                MakeWorld(output=root, preset="standard", train=pairs, val=count, seed=bench.seed)
            )
        config = make_config(root, pairs, epochs, bench.seed, at)
        minutes = train_timed(config)
        held_out = Ingest(root=root, split="val", limit=count)
        found = compare(held_out, config.output, bench.generator)
    notes = (
        f"{pairs} training and {count} held-out pairs (tiles 128 x 128), {epochs} epochs in "
        f"batches of {config.fit.batch} of the toy SegFormer: {minutes:.1f} CPU minutes of the "
        f"training process on one thread (budget {BUDGET:g}), without the decoding of the "
        "pictures, once, in Ray's tasks.",
        f"Required: mIoU of at least {REQUIRED:.2f} on true aerials. Shuffled: against the true "
        "map of another pair. `ignored`: pixels without class (cars), which nothing counts.",
        "Synthetic aerials: S(A) against the true map."
        if bench.generator
        else "Synthetic aerials are left out: pass --generator DIR, a trained generator.",
    )
    rows = [make_row(name, scores) for name, scores in found.items()]
    write_results(
        bench, "Segmenter within ten CPU minutes", rows, make_figures(minutes, found), notes
    )


if __name__ == "__main__":
    main(parse_flags(SegmenterBench))
