"""An index from pictures, end to end: tiles a second against the bare tower, and what is found."""

import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from _harness import Bench, fill_sizes, parse_flags, write_results
from index_1m import train_matcher
from matching import MatchingBench, Rows
from stream import BATCHES, Stage, compare

from cvmatch.data import schema
from cvmatch.data.schema import QUERY_VECTOR
from cvmatch.data.settings import Ingest
from cvmatch.data.tables import batches
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.evaluate.retrieval import KS
from cvmatch.evaluate.run import find_true_rows
from cvmatch.generate.settings import Generate
from cvmatch.index.build import build
from cvmatch.index.embedding import read_gallery
from cvmatch.index.manifest import IndexManifest
from cvmatch.index.reader import Index, rank
from cvmatch.index.settings import BuildIndex, GalleryConfig, Mode
from cvmatch.match.infer import EmbedQuery, EmbedTile, embed_tiles
from cvmatch.match.settings import Embed
from cvmatch.runtime import session
from cvmatch.runtime.settings import Pool
from cvmatch.segment.model import Preprocess, Segmenter
from cvmatch.segment.settings import Segment
from cvmatch.synthesize.run import synthesize
from cvmatch.synthesize.settings import Synthesize


@dataclass(frozen=True, kw_only=True)
class BuildFromImagesBench(Bench):
    """Build an index of all tiles of a world, and search it for its held-out panoramas."""

    tiles: int = 0
    """Tiles that are made for the run, 1 in 40 of them with a query; 0: 20,000, quick 1,600."""
    data: str = ""
    """World to take instead: all its tiles, and the panoramas of its split `val`."""
    matcher: str = ""
    """Trained joint matcher; empty: one is trained for a minute, with the true tiles as A."""
    generator: str = ""
    """Generator that draws the A of the queries; empty: A is the true tile."""
    batch: int = 32
    """Tiles a call of the tower."""
    speed: int = 0
    """Tiles on which tower and pool are timed; 0: 3,000, quick 1,536."""
    rounds: int = 0
    """How often both are timed, in turns; medians are reported. 0: 3, quick 1."""


def write_queries(bench: BuildFromImagesBench, data: str, at: str) -> str:
    """Rows of the held-out panoramas, with A and S."""
    if not bench.generator:
        return f"{Rows(MatchingBench(), at, data=data).true}/val"
    segmenter = f"{at}/segmenter"
    Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=128, num_classes=6)).save(segmenter)
    config = Synthesize(
        data=Ingest(root=data, split="val"),
        generate=Generate(model=bench.generator, pool=Pool(size=2, batch=32)),
        segment=Segment(model=segmenter, pool=Pool(batch=32)),
        output=f"{at}/queries",
    )
    synthesize(config)
    return config.output


def _make_pool(bench: BuildFromImagesBench) -> Pool:
    return replace(GalleryConfig().pool, batch=bench.batch)


def measure_speeds(bench: BuildFromImagesBench, model: str, data: Ingest) -> tuple[float, float]:
    """Tiles a second of the tower in a loop, and of a pool of one in a stream."""
    some = GalleryConfig(tiles=replace(data, limit=bench.speed))
    pool = _make_pool(bench)
    batches = read_gallery(some).iter_batches(batch_size=bench.batch, batch_format="numpy")
    held: list[Any] = list(batches)
    stage = Stage(
        "embed tiles",
        lambda: EmbedTile(model, bench.batch),
        lambda: embed_tiles(read_gallery(some), Embed(model=model, pool=pool)),
    )
    return compare(stage, held, bench.rounds)


def measure_recalls(index: Index, location: str) -> dict[Mode, dict[str, float]]:
    """R@k of the queries in both modes, in [0, 1]."""
    embed = EmbedQuery(index.matcher_dir, "G+A+S")
    pictures = (schema.GROUND, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES)
    columns = [schema.PAIR_ID, *pictures, schema.ERROR]
    found: dict[Mode, list[np.ndarray]] = {"exact": [], "two-stage": []}
    truth = []
    for table in batches(location, columns):
        batch = {name: table[name].to_numpy() for name in columns}
        query = torch.from_numpy(embed(batch)[QUERY_VECTOR]).to(index.device)
        truth.append(find_true_rows(table[schema.PAIR_ID].to_pylist(), index).numpy())
        for mode, rows in found.items():
            rows.append(rank(index, query, max(KS), mode).rows)
    right = np.concatenate(truth)[:, None]
    return {
        mode: {
            f"recall@{k}": float((np.concatenate(rows)[:, :k] == right).any(1).mean()) for k in KS
        }
        for mode, rows in found.items()
    }


def main(bench: BuildFromImagesBench) -> None:
    """Make, build, search."""
    usual = (
        {"tiles": 1_600, "speed": 1_536, "rounds": 1}
        if bench.quick
        else {"tiles": 20_000, "speed": 3_000, "rounds": 3}
    )
    bench = fill_sizes(bench, usual)
    os.environ.setdefault("RAY_worker_niceness", "0")
    session.start(logical_cpus=4)
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        data = bench.data or f"{at}/world"
        if not bench.data:
            held_out = bench.tiles // 40
            rest = bench.tiles - held_out
            make_world(MakeWorld(output=data, preset="standard", train=rest, val=held_out))
        model = bench.matcher or train_matcher(f"{at}/trained")[0]
        location = write_queries(bench, data, f"{at}/rows")
        block = BATCHES * bench.batch
        bare, pooled = measure_speeds(
            bench, model, Ingest(root=data, cache=f"{at}/cache", block=block)
        )
        config = BuildIndex(
            tiles=Ingest(root=data, cache=f"{at}/whole", block=block),
            splits=("train", "val"),
            model=model,
            output=f"{at}/index",
            queries=location,
            pool=_make_pool(bench),
        )
        info = build(config)
        write_report(
            bench, info, measure_recalls(Index.open(config.output), location), bare, pooled
        )


def write_report(
    bench: BuildFromImagesBench,
    info: IndexManifest,
    found: dict[Mode, dict[str, float]],
    bare: float,
    pooled: float,
) -> None:
    """The table."""
    table = [
        {"search": mode, **{f"R@{k}, %": 100 * numbers[f"recall@{k}"] for k in KS}}
        for mode, numbers in found.items()
    ]
    apart = max(abs(found["exact"][f"recall@{k}"] - found["two-stage"][f"recall@{k}"]) for k in KS)
    recall = info.recall
    assert recall
    figures = {"tower.bare": bare, "tower.pool": pooled, "tower.ratio": pooled / bare}
    figures |= {f"{m}.{name}": value for m, row in found.items() for name, value in row.items()}
    figures |= {"recall_apart": apart, "tiles_per_s.embed": info.tiles_per_s["embed"]}
    figures |= {f"stage_s.{name}": value for name, value in info.seconds.items()}
    figures |= {"shortlist.top1": recall.top1, "shortlist.top10": recall.top10}
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in info.seconds.items())
    notes = (
        f"{info.rows} tiles of a world. The tower alone, one thread, batches of {bench.batch} "
        f"in memory: {bare:.1f} tiles/s; a pool of one actor in a stream, which reads and decodes "
        f"beside it, in blocks of {BATCHES} batches: {pooled:.1f} ({pooled / bare:.2f}), "
        f"{bench.rounds} rounds in turns, medians.",
        f"Seconds of the build: {seconds}. Embedding with the start of Ray's processes, the check "
        f"of all pictures and the writing: {info.tiles_per_s['embed']:.1f} tiles/s.",
        f"Shortlist {info.ann.key} of {info.shortlist} tiles; it "
        f"holds {100 * recall.top1:.1f} % of the exact first and "
        f"{100 * recall.top10:.1f} % of the exact first ten answers. R@k of queries of "
        f"modality G+A+S{'' if bench.generator else ' (A is the true tile)'}; two-stage and exact "
        f"are apart by {100 * apart:.2f} points at most.",
    )
    write_results(bench, "An index from pictures", table, figures, notes)


if __name__ == "__main__":
    main(parse_flags(BuildFromImagesBench))
