"""Fine-tune the generator on toy base models, and find held-out tiles by the A that it samples."""

import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _harness import Bench, format_interval, parse_flags, write_results

from cvmatch.data import images, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest, Validation
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.evaluate import generation
from cvmatch.generate.infer import generate
from cvmatch.generate.settings import DEFAULT_SAMPLING, Conditioning, Generate, TrainGenerator
from cvmatch.generate.train import train
from cvmatch.runtime import session
from cvmatch.runtime.settings import Pool
from cvmatch.segment.infer import segment
from cvmatch.segment.model import Preprocess, Segmenter
from cvmatch.segment.settings import Segment
from cvmatch.training.settings import TrainConfig

BUDGET = 15.0
"""CPU minutes that each fine-tuning may take."""

SHOWN = 20
"""Pairs of the picture: the first of the held-out ones."""


@dataclass(frozen=True, kw_only=True)
class GeneratorBench(Bench):
    """Fine-tune the toy base, and find held-out tiles by what it samples."""

    data: str = ""
    """Data set with both splits and class maps; empty: a `standard` world is made for the run."""
    keep: str = ""
    """Directory for the trained generator; empty: it is deleted."""
    picture: str = ""
    """JPEG of the first held-out pairs, such as docs/generated-tiles.jpg; empty: none."""
    pairs: int = 0
    """Training pairs; 0: 2,000, quick 480."""
    held_out: int = 0
    """Pairs of the split `val`; 0: 500, quick 100."""
    epochs: int = 0
    """Epochs of the UNet. 0: 15, quick 2."""
    bev_epochs: int = 0
    """Epochs of the BEV network before; 0: 12, quick 6."""
    seed: int = 0
    """Seed of the world, the training and the noise."""


def make_config(bench: GeneratorBench, root: str, at: str) -> TrainGenerator:
    """What differs from the reference run: toy base models, larger rates, and less time.

    Only the cross-attention and the input convolution learn, without the image terms: with all
    weights at the same rate the UNet forgets what tiles look like.
    """
    epochs = bench.epochs or (2 if bench.quick else 15)
    return TrainGenerator(
        data=Ingest(root=root, split="train", limit=bench.pairs or (480 if bench.quick else 2000)),
        val=Validation(root=root, limit=100),  # after each epoch
        diffusion=base_models.DIFFUSION,
        clip=base_models.CLIP,
        lpips_vgg=base_models.TOWER,
        conditioning=Conditioning(panorama_width=256),
        train_unet="attention",
        clip_weight=0.0,
        lpips_weight=0.0,
        bev_nce_weight=0.2,
        x0_nce_weight=0.15,
        ema_decay=0.99,
        mirror=True,
        lr=3.5e-4,
        lr_conditioner=2e-3,
        pretrain_bev=bench.bev_epochs or (6 if bench.quick else 12),
        validation_images=0,
        latent_cache=f"{at}/latents",
        output=f"{at}/generator",
        fit=TrainConfig(
            epochs=epochs,
            batch=32,
            seed=bench.seed,
            storage=f"{at}/runs",
            cache=True,
        ),
    )


def train_generator(config: TrainGenerator) -> dict[str, float]:
    """Train on one thread; returns CPU minutes of this process, and the last validation."""
    torch.set_num_threads(1)  # a second one saves a third of the time, and costs a third more CPU
    begin = time.process_time()
    metrics = train(config).metrics or {}
    return {"minutes": (time.process_time() - begin) / 60, **metrics}


def generate_rows(model: str, data: Ingest, segmenter: str) -> list[dict[str, Any]]:
    """Rows with what the generator draws, at the default sampler, and its class map."""
    rows = generate(
        PairDataset.open(data).rows(), Generate(model=model, pool=Pool(size=2, batch=32))
    )
    return segment(rows, Segment(model=segmenter, pool=Pool(batch=32))).take_all()


def paint_class_maps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the true class map in the classes' mean colours as A.

    All that a perfect knowledge of the classes would tell of a tile's colours.
    """
    ids = [images.classes_of(images.decode(row[schema.CLASSES]), 6) for row in rows]
    ids = np.where(np.stack(ids) == schema.IGNORE, 6, np.stack(ids))
    tiles = np.stack([images.decode(row[schema.AERIAL], ids.shape[1:]) for row in rows])
    colours = np.zeros((7, 3))
    for name in np.unique(ids):
        colours[name] = tiles[ids == name].mean(axis=0)
    pictures = colours.round().astype(np.uint8)[ids]
    return [
        {**row, schema.SYNTHETIC: images.encode(picture)}
        for row, picture in zip(rows, pictures, strict=True)
    ]


def make_row(found: dict[str, float]) -> dict[str, Any]:
    """A row of the table."""
    return {
        "CPU min": found["minutes"],
        "R@1, %": format_interval(found, "recall@1"),
        "R@1 %, %": format_interval(found, "recall@1%"),
        "R@10 %, %": format_interval(found, "recall@10%"),
        "loss at t=800, right / shuffled": f"{found['val/loss_correct/0.8']:.3f} / "
        f"{found['val/loss_shuffled/0.8']:.3f}",
        "gap, %": 100 * found["val/gap/0.8"],
        "chroma R@1 / R@10 %": f"{100 * found['chroma/recall@1']:.1f} / "
        f"{100 * found['chroma/recall@10%']:.1f}",
        "gradient R@1 / R@10 %": f"{100 * found['gradient/recall@1']:.1f} / "
        f"{100 * found['gradient/recall@10%']:.1f}",
        "class maps, mIoU / shuffled": f"{found['miou']:.3f} / {found['miou_shuffled']:.3f}",
        "PSNR": found["psnr"],
        "SSIM": found["ssim"],
        "NCC / shuffled": f"{found['ncc']:.3f} / {found['ncc_shuffled']:.3f}",
    }


def make_image_grid(rows: list[dict[str, Any]]) -> np.ndarray:
    """Panorama, what was drawn of it, and the true tile, in two columns of pairs."""
    strips = []
    for row in rows:
        parts = [images.decode(row[schema.GROUND], (64, 256))]
        parts += [images.decode(row[name], (64, 64)) for name in (schema.SYNTHETIC, schema.AERIAL)]
        strips.append(np.hstack(parts))
    half = len(strips) // 2
    return np.hstack([np.vstack(strips[:half]), np.vstack(strips[half:])])


FIGURES = {
    "cpu_minutes": "minutes",
    "recall@1": "recall@1",
    "recall@1%": "recall@1%",
    "recall@10%": "recall@10%",
    "gap": "val/gap/0.8",
    "miou": "miou",
    "miou_shuffled": "miou_shuffled",
}
"""The figures of the last line, and their names here."""


def main(bench: GeneratorBench) -> None:
    """Train, sample, compare."""
    session.start(logical_cpus=4)
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        root = bench.data or _make_data(bench, f"{at}/world")
        # As pre-trained: on pictures of other worlds, with all six classes.
        segmenter = f"{at}/segmenter"
        Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=128, num_classes=6)).save(
            segmenter
        )
        config = make_config(bench, root, bench.keep or at)
        numbers = train_generator(config)
        rows = generate_rows(config.output, _held_out_data(bench, root), segmenter)
        numbers |= _measure_generation(rows)
        maps = generation.measure_segmentation(rows, num_classes=6)
        assert maps is not None, "no row has both maps"
        numbers |= {"miou": maps.miou, "miou_shuffled": maps.miou_shuffled}
        bound = _measure_generation(paint_class_maps(rows))
        if bench.picture:
            with open(bench.picture, "wb") as file:
                file.write(images.encode(make_image_grid(rows[:SHOWN]), "JPEG"))
    figures = {f"class_map.{name}": bound[name] for name in ("recall@1", "recall@10%")}
    figures |= {short: numbers[name] for short, name in FIGURES.items()}
    write_results(bench, "Generator", [make_row(numbers)], figures, _write_notes(numbers, bound))


def _measure_generation(rows: list[dict[str, Any]]) -> dict[str, float]:
    result = generation.measure_generation(rows)
    assert result is not None, "no row has both pictures"
    return dict(result.to_json())


def _held_out_data(bench: GeneratorBench, root: str) -> Ingest:
    return Ingest(root=root, split="val", limit=bench.held_out or (100 if bench.quick else 500))


def _make_data(bench: GeneratorBench, root: str) -> str:
    train, val = (480, 100) if bench.quick else (None, None)
    train, val = bench.pairs or train, bench.held_out or val
    make_world(MakeWorld(output=root, preset="standard", train=train, val=val, seed=bench.seed))
    return root


def _write_notes(found: dict[str, float], bound: dict[str, float]) -> tuple[str, ...]:
    return (
        f"R@k: the true tile among {found['gallery']:g} held-out ones by luminance "
        "correlation (NCC) of A with it at 16 x 16, 95 % bootstrap intervals; chroma and gradient "
        "the same by what no term was trained on. Class maps: S(A) against the true map, by the "
        "toy SegFormer as it "
        f"was pre-trained. Sampler: {DEFAULT_SAMPLING.describe()}.",
        "What a perfect knowledge of the classes would give: the true class map, each class in its "
        f"mean colour, finds its tile with R@1 {format_interval(bound, 'recall@1')} and R@10 % "
        f"{format_interval(bound, 'recall@10%')} (in %).",
        "CPU min: of this process from the start of the training to its end, of at most "
        f"{BUDGET:g}; what Ray's processes do (decoding, encoding once) is not in it.",
    )


if __name__ == "__main__":
    main(parse_flags(GeneratorBench))
