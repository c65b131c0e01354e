"""Which matcher finds the tile: branches and their sum, the joint score, the field's recipe."""

import functools
import glob
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from _harness import Bench, fill_sizes, parse_flags, write_results
from generator import GeneratorBench
from generator import make_config as generator_settings
from jaxtyping import Float, Int64
from pyarrow import parquet
from torch import Tensor

from cvmatch import config as configs
from cvmatch.data import images, manifest, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import Difficulty, MakeWorld
from cvmatch.evaluate.queries import embed_queries, read_query_ids
from cvmatch.evaluate.settings import Evaluate
from cvmatch.generate.settings import Generate
from cvmatch.generate.train import train as train_generator
from cvmatch.index.build import build
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from cvmatch.match.model import Matcher
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.train import train
from cvmatch.nn import metrics
from cvmatch.runtime import hardware, progress, session
from cvmatch.runtime.settings import Pool
from cvmatch.segment.model import Preprocess, Segmenter
from cvmatch.segment.settings import Segment
from cvmatch.synthesize.run import synthesize
from cvmatch.synthesize.settings import Synthesize
from cvmatch.training.settings import TrainConfig

GALLERY = 512
"""Tiles among which a query is ranked at first."""

SPLITS = ("train", "val")

SIZES = {
    True: {"pairs": 160, "held_out": 48, "epochs": 2},
    False: {"pairs": 2000, "held_out": 1536, "epochs": 20},
}
"""Of a quick run, and of another."""


@dataclass(frozen=True, kw_only=True)
class MatchingBench(Bench):
    """Train each matcher on the `standard` world, and find held-out tiles with it."""

    only: tuple[str, ...] = ()
    """Rows of the table (words of their names that tell them); empty: all."""
    keep: str = ""
    """Directory for data sets, generators and ranks, which a later run uses again (processes of
    different seeds can share it); empty: they are deleted."""
    pairs: int = 0
    """Training pairs; 0: 2,000, quick 160."""
    held_out: int = 0
    """Pairs of the split `val`; 0: 1,536, quick 48."""
    epochs: int = 0
    """Epochs of each matcher; 0: 20, quick 2."""
    seeds: tuple[int, ...] = (0,)
    """Each is of the world, the generator and the trainings; the table pools their queries."""
    difficulty: Difficulty = field(default_factory=Difficulty)
    """Of the world."""


@dataclass(frozen=True)
class Contender:
    """Rows of the table: which pairs it learns from, how, and what its queries are."""

    rows: str
    changes: dict[str, Any] = field(default_factory=dict)
    queries: dict[str, Any] = field(default_factory=lambda: {"modalities": ("G",)})
    epochs: float = 1.0
    """Share of the usual epochs."""


ALONE = {"branches": ("direct",)}
"""The direct branch: G against C."""

ALL = {"modalities": ("G", "G+A", "G+A+S", "A")}

SQUARE = {"projection": "square", "grid": (8, 8)}
"""Tiles as they are; features in squares too."""

DEFAULT, LONGER = "sum (default)", "direct, twice the epochs"
"""Whose G the others are compared with."""

CONTENDERS = {
    DEFAULT: Contender("synthesized", {}, ALL),
    LONGER: Contender("plain", ALONE, epochs=2.0),
    "sum with aerial": Contender(
        "synthesized", {"branches": ("direct", "aerial", "layout")}, ALL, epochs=2 / 3
    ),
    "aerial and layout": Contender(
        "synthesized",
        {"branches": ("aerial", "layout")},
        {"modalities": ("A",)},
        epochs=0.5,
    ),
    "joint (published)": Contender("synthesized", {"score": "joint"}, ALL, epochs=0.5),
    "Sample4Geo's recipe": Contender(
        "plain", ALONE | SQUARE | {"shared": True, "hard_negatives_every": 2}
    ),
    "Sample4Geo's recipe, polar": Contender(
        "plain", ALONE | {"shared": True, "hard_negatives_every": 2}
    ),
    "sum, true C as A": Contender("true", {}, ALL),
    "direct, square": Contender("plain", ALONE | SQUARE),
    "direct, triplet": Contender("plain", ALONE | {"loss": "triplet"}),
    "unknown heading": Contender(
        "plain", ALONE | {"unknown_heading": True}, {"modalities": ("G",), "unknown_heading": True}
    ),
    "180 degrees": Contender(
        "plain", ALONE | {"fov": (180.0,)}, {"modalities": ("G",), "fov": (180.0,)}
    ),
    "90 degrees": Contender(
        "plain", ALONE | {"fov": (90.0,)}, {"modalities": ("G",), "fov": (90.0,)}
    ),
}


class Ranks(NamedTuple):
    """Zero-based ranks of the true tiles, of one matcher and modality."""

    galleries: Int64[Tensor, " query"]
    """Each among its own GALLERY tiles."""
    joined: Int64[Tensor, " query"]
    """Among all."""


@dataclass(frozen=True)
class Found:
    """What one matcher of one seed found."""

    minutes: float
    """CPU minutes of its training."""
    ranks: dict[str, Ranks]
    """By modality."""


class Rows:
    """Places of the rows of one seed, made when first asked for, or found where they are kept."""

    def __init__(self, bench: MatchingBench, at: str, seed: int = 0, data: str = "") -> None:
        """`data`: a data set with class maps; empty: a `standard` world is made."""
        self.bench, self.at, self.seed, self.data = bench, at, seed, data

    @functools.cached_property
    def root(self) -> str:
        """The data set."""
        if self.data:
            return self.data
        place = f"{self.at}/world"
        if glob.glob(f"{place}/**/*.csv", recursive=True):  # they are written last
            return place
        make_world(
            MakeWorld(
                output=place,
                preset="standard",
                train=self.bench.pairs,
                val=self.bench.held_out,
                difficulty=self.bench.difficulty,
                seed=self.seed,
            )
        )
        return place

    @functools.cached_property
    def plain(self) -> str:
        """Pairs without A."""
        return self._written("plain")

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
                generate=Generate(model=self.generator, pool=Pool(size=2, batch=32)),
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

        return self._written("true", changed)

    @functools.cached_property
    def generator(self) -> str:
        """A generator that was trained on the split `train`, as generator.py does."""
        place = f"{self.at}/generator"
        if not os.path.exists(f"{place}/generator/conditioner.json"):
            bench = GeneratorBench(
                quick=self.bench.quick,
                pairs=self.bench.pairs,
                held_out=self.bench.held_out,
                seed=self.seed,
            )
            config = generator_settings(bench, self.root, place)
            train_generator(replace(config, val=None, output=f"{place}/generator"))
        return f"{place}/generator"

    def split(self, split: Any) -> Ingest:
        """Pairs of a split."""
        sizes = {"train": self.bench.pairs, "val": self.bench.held_out}
        return Ingest(root=self.root, split=split, limit=sizes[split])

    def _written(
        self, name: str, change: Callable[[pa.Table], pa.Table] = lambda table: table
    ) -> str:
        for split in SPLITS:
            place = f"{self.at}/{name}/{split}"
            if os.path.exists(f"{place}/{manifest.NAME}"):
                continue
            rows = PairDataset.open(self.split(split)).rows().take_all()
            table = change(schema.conform(pa.Table.from_pylist(rows)))
            os.makedirs(place, exist_ok=True)
            parquet.write_table(table, f"{place}/part-0.parquet")
            manifest.write(place, rows=len(table), config=self.bench, models={}, source=self.root)
        return f"{self.at}/{name}"


def make_config(
    bench: MatchingBench, rows: str, changes: dict[str, Any], at: str, seed: int = 0
) -> TrainMatcher:
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
        fit=TrainConfig(epochs=bench.epochs, batch=32, seed=seed, storage=f"{at}/runs", cache=True),
    )
    return replace(config, **changes)


def measure(bench: MatchingBench, rows: Rows, name: str) -> Found:
    """Train on one thread, index the held-out tiles, and rank them for each modality."""
    contender, at = CONTENDERS[name], f"{rows.at}/{name}"
    place = getattr(rows, contender.rows)
    longer = replace(bench, epochs=max(1, round(contender.epochs * bench.epochs)))
    config = make_config(longer, place, contender.changes, at, rows.seed)
    torch.set_num_threads(1)
    begin = time.process_time()
    train(config)
    minutes = (time.process_time() - begin) / 60
    queries = f"{place}/val"
    build(BuildIndex(rows=queries, model=config.output, output=f"{at}/index"))
    index = Index.open(f"{at}/index")
    vectors = embed_queries(
        Evaluate(queries=queries, **contender.queries), Matcher.load(index.matcher_dir)
    )
    tiles, ids = index.live_ids.to_pylist(), read_query_ids(queries)
    order = sorted(range(len(ids)), key=ids.__getitem__)  # of all contenders: they are paired
    own = torch.tensor([tiles.index(ids[row]) for row in order])
    last = list(vectors)[-1][0]
    return Found(
        minutes,
        {
            modality: rank_queries(torch.cat([*index.iter_scores(query[order])], dim=1)[:, own])
            for (view, modality), query in vectors.items()
            if view == last
        },
    )


def rank_queries(score: Float[Tensor, "query tile"]) -> Ranks:
    """Rank the tiles on the diagonal: each in its part of the gallery, and in the whole."""
    blocks = [
        metrics.ranks(score[at : at + GALLERY, at : at + GALLERY], torch.arange(size))
        for at in range(0, len(score), GALLERY)
        if (size := min(GALLERY, len(score) - at))
    ]
    return Ranks(torch.cat(blocks), metrics.ranks(score, torch.arange(len(score))))


def find(bench: MatchingBench, rows: Rows, name: str) -> Found:
    """Measure a contender, or read what an earlier run kept of it."""
    place = f"{rows.at}/{name}/ranks.pt"
    if not os.path.exists(place):
        found = measure(bench, rows, name)
        plain = {modality: tuple(ranks) for modality, ranks in found.ranks.items()}
        torch.save({"minutes": found.minutes, "ranks": plain}, place)
    read = torch.load(place, weights_only=True)
    return Found(read["minutes"], {name: Ranks(*ranks) for name, ranks in read["ranks"].items()})


def make_rows(found: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """Rows of the table: one for each matcher and modality, of the queries of all seeds."""
    table = []
    for name, seeds in found.items():
        for modality in seeds[0].ranks:
            row = {
                "matcher": name,
                "modality": modality,
                "CPU min": sum(one.minutes for one in seeds) / len(seeds),
            }
            for kind in Ranks._fields:
                hits = [_hits(one, modality, kind) for one in seeds]
                row[f"R@1 {kind}, %"] = format_mean(torch.cat(hits))
                for title, base in (("G of the sum", DEFAULT), ("longer G", LONGER)):
                    gains = [
                        mine - _hits(other, "G", kind)
                        for mine, other in zip(hits, found.get(base, []), strict=False)
                    ]
                    row[f"{kind}, minus {title}"] = format_mean(torch.cat(gains)) if gains else ""
                    if len(gains) > 1:
                        each = " / ".join(f"{100 * gain.mean():+.1f}" for gain in gains)
                        row[f"{kind}, minus {title}"] += f" ({each})"
            table.append(row)
    return table


def format_mean(values: Float[Tensor, " query"]) -> str:
    """Format the mean of shares, in per cent, with its 95 % interval."""
    low, high = metrics.bootstrap(values)
    return f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _hits(found: Found, modality: str, kind: str) -> Float[Tensor, " query"]:
    return (getattr(found.ranks[modality], kind) == 0).float()


def place_of(bench: MatchingBench, temporary: str, seed: int) -> str:
    """Return the directory of what a seed needs, the same one for the same settings."""
    about = (
        bench.pairs,
        bench.held_out,
        bench.epochs,
        bench.quick,
        configs.plain(bench.difficulty),
    )
    return f"{os.path.abspath(bench.keep or temporary)}/{manifest.digest(about)[:8]}/{seed}"


def main(bench: MatchingBench) -> None:
    """Train and measure each."""
    bench = fill_sizes(bench, SIZES[bench.quick])
    session.start(logical_cpus=4)
    hardware.keep_freed_memory()
    chosen = [
        name for name in CONTENDERS if not bench.only or any(word in name for word in bench.only)
    ]
    found: dict[str, list[Found]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        with progress.watch(
            "matchers", len(chosen) * len(bench.seeds), lambda: sum(map(len, found.values()))
        ):
            for seed in bench.seeds:
                rows = Rows(bench, place_of(bench, at, seed), seed)
                for name in chosen:
                    found[name].append(find(bench, rows, name))
    figures = {
        f"{name}.{modality}.{kind}": float(
            torch.cat([_hits(one, modality, kind) for one in seeds]).mean()
        )
        for name, seeds in found.items()
        for modality in seeds[0].ranks
        for kind in Ranks._fields
    }
    notes = (
        f"{bench.pairs} pairs; {bench.held_out} held-out ones of other worlds for each of the "
        f"seeds {bench.seeds}, each query among its own {GALLERY} tiles (galleries) and among all "
        f"{bench.held_out} of its seed (joined); {bench.epochs} epochs (with aerial two thirds of "
        "them, joint half: that takes as long), batches of 32; toy towers (4 convolutions), polar "
        "views and panoramas of 64 x 256 pixels, InfoNCE where nothing else is said. Points of R@1 "
        "with 95 % bootstrap intervals by query (what another training would do is not in them), "
        "differences paired, those of the seeds in brackets; ties against the query.",
        "CPU min: of this process from the start of the training to its end; what Ray's processes "
        "do (decoding, mining's embedding) is not in it. The G of the sum is the direct branch "
        "alone with the CPU of the whole matcher, since layout is not trained; 64 of its pairs are "
        "held out for the weights. The longer G takes as much CPU again as the generator's "
        "training.",
    )
    write_results(bench, "Matching", make_rows(found), figures, notes)


if __name__ == "__main__":
    main(parse_flags(MatchingBench))
