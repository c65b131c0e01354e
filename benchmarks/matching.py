"""Which matcher finds the tile: branches and their sum, the joint score, the field's recipe."""

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from _harness import Bench, fill_sizes, format_interval, parse_flags, write_results
from generator import GeneratorBench
from generator import make_config as generator_settings
from pyarrow import parquet

from cvmatch.data import images, manifest, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import Difficulty, MakeWorld
from cvmatch.evaluate.run import evaluate
from cvmatch.evaluate.settings import Evaluate
from cvmatch.generate.settings import Generate
from cvmatch.generate.train import train as train_generator
from cvmatch.index.build import build
from cvmatch.index.settings import BuildIndex
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.train import train
from cvmatch.runtime import hardware, progress, session
from cvmatch.runtime.settings import Pool
from cvmatch.segment.model import Preprocess, Segmenter
from cvmatch.segment.settings import Segment
from cvmatch.synthesize.run import synthesize
from cvmatch.synthesize.settings import Synthesize
from cvmatch.training.settings import TrainConfig

BUDGET = 15.0
"""CPU minutes that each training may take."""

SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class MatchingBench(Bench):
    """Train each matcher on the `standard` world, and find held-out tiles with it."""

    only: tuple[str, ...] = ()
    """Rows of the table (words of their names that tell them); empty: all."""
    data: str = ""
    """Data set with both splits and class maps; empty: a `standard` world is made for the run."""
    generator: str = ""
    """Generator trained on its split `train`; empty: one is trained, as generator.py does."""
    pairs: int = 0
    """Training pairs; 0: 2,000, quick 160."""
    held_out: int = 0
    """Pairs of the split `val`; 0: 500, quick 48."""
    epochs: int = 0
    """Epochs of each matcher; 0: 10, quick 2."""
    seed: int = 0
    """Seed of the world, where one is made, and of the training."""


@dataclass(frozen=True)
class Contender:
    """A row of the table: which rows it learns from, how, and how it is evaluated."""

    rows: str
    changes: dict[str, Any]
    evaluate: dict[str, Any]


ALONE = {"branches": ("direct",)}
"""The direct branch: G against C."""

ALL = {"modalities": ("G", "G+A", "G+A+S", "A")}

SQUARE = {"projection": "square", "grid": (8, 8)}
"""Tiles as they are; features in squares too."""

CONTENDERS = {
    "direct, square": Contender("plain", ALONE | SQUARE, {}),
    "direct, polar": Contender("plain", ALONE, {}),
    "direct, polar, triplet": Contender("plain", ALONE | {"loss": "triplet"}, {}),
    "Sample4Geo's recipe": Contender(
        "plain", ALONE | SQUARE | {"shared": True, "hard_negatives_every": 2}, {}
    ),
    "sum (default)": Contender("synthesized", {}, ALL),
    "sum, without layout": Contender("synthesized", {"branches": ("direct", "aerial")}, ALL),
    "sum, without aerial": Contender("synthesized", {"branches": ("direct", "layout")}, ALL),
    "A alone": Contender("synthesized", {"branches": ("aerial", "layout")}, {"modalities": ("A",)}),
    "joint": Contender("synthesized", {"score": "joint"}, ALL),
    "sum, true C as A": Contender("true", {}, ALL),
    "heading noise 10 deg, offset 3 m": Contender("shaken", ALONE, {}),
    "unknown heading": Contender(
        "plain", ALONE | {"unknown_heading": True}, {"unknown_heading": True}
    ),
    "180 degrees": Contender("plain", ALONE | {"fov": 180.0}, {"fov": (180.0,)}),
    "90 degrees": Contender("plain", ALONE | {"fov": 90.0}, {"fov": (90.0,)}),
}


class Rows:
    """Places of rows, made when first bench for."""

    def __init__(self, bench: MatchingBench, at: str) -> None:
        self.bench, self.at = bench, at

    @functools.cached_property
    def root(self) -> str:
        """The data set."""
        return self.bench.data or self._world("world", Difficulty())

    @functools.cached_property
    def plain(self) -> str:
        """Pairs without A."""
        return self._written("plain", self.root)

    @functools.cached_property
    def shaken(self) -> str:
        """Pairs of a harder world: headings and positions are not exact."""
        hard = Difficulty(heading_noise=10.0, camera_offset=3.0)
        return self._written("shaken", self._world("hard", hard))

    @functools.cached_property
    def synthesized(self) -> str:
        """Pairs with the A and S of the generator and the toy segmenter as it was pre-trained."""
        segmenter = f"{self.at}/segmenter"
        Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=128, num_classes=6)).save(
            segmenter
        )
        for split in SPLITS:
            config = Synthesize(
                data=self.split(split),
                generate=Generate(model=self._generator(), pool=Pool(size=2, batch=32)),
                segment=Segment(model=segmenter, pool=Pool(batch=32)),
                output=f"{self.at}/synthesized/{split}",
            )
            synthesize(config)
        return f"{self.at}/synthesized"

    @functools.cached_property
    def true(self) -> str:
        """Pairs whose A and S are the tile and its class map: what no generator can better."""

        def changed(table: pa.Table) -> pa.Table:
            maps = [
                images.encode(images.classes_of(images.decode(data), 6))
                for data in table[schema.CLASSES].to_pylist()
            ]
            own = {schema.SYNTHETIC: table[schema.AERIAL], schema.SYNTHETIC_CLASSES: [maps]}
            kept = {name: table[name] for name in table.column_names if name not in own}
            return schema.conform(
                pa.table(kept | {k: pa.chunked_array(v, pa.binary()) for k, v in own.items()})
            )

        return self._written("true", self.root, changed)

    def split(self, split: Any, root: str = "") -> Ingest:
        """Pairs of a split."""
        bench = self.bench
        sizes = {"train": bench.pairs, "val": bench.held_out}
        return Ingest(root=root or self.root, split=split, limit=sizes[split])

    def gallery(self, rows: str) -> str:
        """URI of the rows whose tiles are searched."""
        return f"{getattr(self, rows)}/val"

    def _world(self, name: str, difficulty: Difficulty) -> str:
        make_world(
            MakeWorld(
                output=f"{self.at}/{name}",
                preset="standard",
                train=self.bench.pairs,
                val=self.bench.held_out,
                difficulty=difficulty,
                seed=self.bench.seed,
            )
        )
        return f"{self.at}/{name}"

    def _written(
        self, name: str, root: str, change: Callable[[pa.Table], pa.Table] = lambda table: table
    ) -> str:
        for split in SPLITS:
            rows = PairDataset.open(self.split(split, root)).rows().take_all()
            table = change(schema.conform(pa.Table.from_pylist(rows)))
            place = f"{self.at}/{name}/{split}"
            os.makedirs(place)
            parquet.write_table(table, f"{place}/part-0.parquet")
            manifest.write(place, rows=len(table), config=self.bench, models={}, source=root)
        return f"{self.at}/{name}"

    def _generator(self) -> str:
        if self.bench.generator:
            return self.bench.generator
        return self._trained

    @functools.cached_property
    def _trained(self) -> str:
        bench = GeneratorBench(
            quick=self.bench.quick,
            pairs=self.bench.pairs,
            held_out=self.bench.held_out,
            seed=self.bench.seed,
        )
        config = generator_settings(bench, self.root, f"{self.at}/generator")
        train_generator(replace(config, val=None))
        return config.output


def make_config(bench: MatchingBench, rows: str, changes: dict[str, Any], at: str) -> TrainMatcher:
    """What differs from the reference run: the toy tower, its rates, and less time."""
    config = TrainMatcher(
        pairs=f"{rows}/train",
        tower=base_models.TOWER,
        grid=(4, 32),
        panorama=(64, 256),
        tile_size=128,
        lr_towers=1e-3,
        lr_heads=1e-3,
        output=f"{at}/matcher",
        fit=TrainConfig(
            epochs=bench.epochs, batch=32, seed=bench.seed, storage=f"{at}/runs", cache=True
        ),
    )
    return replace(config, **changes)


def measure(bench: MatchingBench, rows: Rows, contender: Contender) -> dict[str, Any]:
    """Train on one thread, index the held-out tiles, and evaluate: results.json and CPU minutes."""
    with tempfile.TemporaryDirectory() as at:
        config = make_config(bench, getattr(rows, contender.rows), contender.changes, at)
        torch.set_num_threads(1)
        begin = time.process_time()
        train(config)
        minutes = (time.process_time() - begin) / 60
        gallery = rows.gallery(contender.rows)
        build(BuildIndex(rows=gallery, model=config.output, output=f"{at}/index"))
        found = evaluate(
            Evaluate(
                **{"modalities": ("G",), **contender.evaluate},
                queries=gallery,
                index=f"{at}/index",
                modes=("exact",),
                num_classes=6,
                output=f"{at}/evaluation",
            )
        )
    return {**found.to_json(), "minutes": minutes}


def make_rows(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: one for each modality, of the view that it was trained for."""
    view, modalities = list(found["retrieval"].items())[-1]
    return [
        {
            "matcher": name,
            "view": view,
            "modality": modality,
            "CPU min": found["minutes"],
            "R@1, %": format_interval(numbers, "recall@1"),
            "R@1 minus G's": format_interval(numbers.get("minus_G", {}), "recall@1"),
            "R@5 (R@1 %), %": format_interval(numbers, "recall@5"),
            "R@10, %": format_interval(numbers, "recall@10"),
            "R@1 of one world, %": 100 * numbers.get("near_recall@1", float("nan")),
            "one of ten, top 1, %": 100 * numbers["one_of_ten_top1"],
            "median rank": numbers["median_rank"],
        }
        for modality, numbers in modalities.items()
    ]


def main(bench: MatchingBench) -> None:
    """Train and measure each."""
    sizes = (
        {"pairs": 160, "held_out": 48, "epochs": 2}
        if bench.quick
        else {"pairs": 2000, "held_out": 500, "epochs": 10}
    )
    bench = fill_sizes(bench, sizes)
    session.start(logical_cpus=4)
    hardware.keep_freed_memory()
    chosen = [
        name for name in CONTENDERS if not bench.only or any(word in name for word in bench.only)
    ]
    table, figures = [], {}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        rows = Rows(bench, at)
        with progress.watch(
            "matchers", len(chosen), lambda: len({row["matcher"] for row in table})
        ):
            for name in chosen:
                found = measure(bench, rows, CONTENDERS[name])
                table += make_rows(name, found)
                modalities = list(found["retrieval"].values())[-1]
                for modality, numbers in modalities.items():
                    for key in ("recall@1", "recall@10"):
                        figures[f"{name}.{modality}.{key}"] = numbers[key]
    notes = (
        f"{bench.pairs} pairs, {bench.held_out} held-out ones of other worlds (the gallery), seed "
        f"{bench.seed}, {bench.epochs} epochs, batches of 32; toy towers (4 convolutions), polar "
        "views and panoramas of 64 x 256 pixels, InfoNCE where nothing else is said. R@k with 95 % "
        "bootstrap intervals, ties against the query. One of ten is for comparison only.",
        "CPU min: of this process from the start of the training to its end, of at most "
        f"{BUDGET:g}; what Ray's processes do (decoding, mining's embedding) is not in it. The "
        "joint rows share one training.",
    )
    write_results(bench, "Matching", table, figures, notes)


if __name__ == "__main__":
    main(parse_flags(MatchingBench))
