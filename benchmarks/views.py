"""One matcher for all widths of views against one trained for each, headings known and tried.

On the pairs of matching.py, which `--keep` finds again. G alone.
"""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import matching
import pyarrow as pa
import torch
from _harness import Bench, fill_sizes, parse_flags, write_results
from matching import ALONE, GALLERY, MatchingBench, Rows, make_config, rank_queries
from pyarrow import parquet

from cvmatch.data import schema, storage, tables
from cvmatch.evaluate.queries import QueryView, draw_headings, embed_queries, read_query_ids
from cvmatch.evaluate.settings import Evaluate
from cvmatch.index.build import build
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from cvmatch.match.model import Matcher
from cvmatch.match.train import train
from cvmatch.nn import geometry, metrics
from cvmatch.runtime import hardware, session

WIDTHS = (360.0, 180.0, 90.0, 70.0)
"""Degrees of the views."""

ALL = "all widths"

MATCHERS: dict[str, tuple[float, ...]] = {
    ALL: (360.0, 70.0),
    **{f"{width:g} alone": (width, width) for width in WIDTHS},
}
"""By name: `fov` of its training."""

SPECIALIST = (
    "one for it, R@1 %",
    "one for all minus one for it",
    "heading error of the one for it",
)
"""Columns; empty where the specialist was not trained."""

SIZES = {
    True: {"pairs": 160, "held_out": 48, "epochs": 2, "headings": 8},
    False: {"pairs": 2000, "held_out": 1536, "epochs": 10, "headings": 32},
}


@dataclass(frozen=True, kw_only=True)
class ViewsBench(Bench):
    """Train a matcher for all widths of views, and one for each, with the same budget."""

    keep: str = ""
    """Directory of matching.py's data sets; empty: they are made and deleted."""
    seed: int = 0
    """Of the world and the trainings."""
    pairs: int = 0
    """Training pairs; 0: 2,000, quick 160."""
    held_out: int = 0
    """Pairs of the split `val`, of which the first gallery is ranked; 0: 1,536, quick 48."""
    epochs: int = 0
    """Of each training; 0: 10, quick 2."""
    headings: int = 0
    """Headings that are tried; 0: 32, quick 8."""
    only: tuple[str, ...] = ()
    """Matchers by name; empty: all."""


@dataclass(frozen=True)
class Found:
    """What a matcher found in one kind of view."""

    rank: torch.Tensor
    """Zero-based rank of each query's tile in its gallery."""
    error: float | None
    """Median degrees by which the first answer's heading is wrong; None where none was tried."""


def train_matcher(bench: ViewsBench, rows: Rows, name: str) -> float:
    """Train on one thread, index the first gallery's tiles; return the CPU minutes."""
    at = f"{rows.at}/{name}"
    if storage.exists(f"{at}/minutes.json"):
        return storage.read_json(f"{at}/minutes.json")
    changes: dict[str, Any] = ALONE | {"fov": MATCHERS[name]}
    config = make_config(as_matching(bench), rows.plain, changes, at, rows.seed)
    torch.set_num_threads(1)
    begin = time.process_time()
    train(config)
    minutes = (time.process_time() - begin) / 60
    build(BuildIndex(rows=f"{rows.plain}/val", model=config.output, output=f"{at}/index"))
    storage.write_json(f"{at}/minutes.json", minutes)
    return minutes


def select_queries(rows: Rows) -> str:
    """Write the rows of the first gallery's queries, in the order of their ids; return where."""
    place = f"{rows.at}/first"
    table = pa.concat_tables(tables.batches(f"{rows.plain}/val", schema.SYNTHESIZED.names))
    os.makedirs(place, exist_ok=True)
    first = table.sort_by(schema.PAIR_ID).slice(0, GALLERY)
    parquet.write_table(first, f"{place}/part-0.parquet")
    return place


def find(bench: ViewsBench, rows: Rows, name: str, width: float) -> dict[str, Found]:
    """Rank the first gallery's queries of a width, their headings known (north) and tried."""
    index = Index.open(f"{rows.at}/{name}/index")
    queries = select_queries(rows)
    config = Evaluate(
        queries=queries,
        modalities=("G",),
        fov=(width,),
        unknown_heading=True,
        headings=bench.headings,
    )
    vectors = embed_queries(config, Matcher.load(index.matcher_dir))
    tiles, ids = index.live_ids.to_pylist(), read_query_ids(queries)
    own = torch.tensor([tiles.index(pair_id) for pair_id in ids])
    north = vectors[QueryView(width, False), "G"]
    score = torch.cat([*index.iter_scores(north)], dim=1)[:, own]
    found = {"north": Found(rank_queries(score).joined, None)}
    turned = vectors[QueryView(width, True), "G"]
    flat = torch.cat([*index.iter_scores(turned.flatten(0, 1))], dim=1)[:, own]
    best = flat.unflatten(0, turned.shape[:2]).max(dim=1)
    first = best.indices.gather(1, best.values.argmax(1, keepdim=True))[:, 0]
    headings = torch.tensor(geometry.tried(bench.headings))[first]
    true = draw_headings(ids, config.seed)
    error = ((headings - true + 180) % 360 - 180).abs().median().item()
    return found | {"unknown": Found(rank_queries(best.values).joined, error)}


def as_matching(bench: ViewsBench) -> MatchingBench:
    """Return the settings of matching.py with the same pairs."""
    return MatchingBench(
        quick=bench.quick, keep=bench.keep, pairs=bench.pairs, held_out=bench.held_out,
        epochs=bench.epochs, seeds=(bench.seed,),
    )  # fmt: skip


def place_of(bench: ViewsBench, at: str) -> str:
    """Return where matching.py keeps the pairs: trainings of other epochs share them."""
    usual = replace(as_matching(bench), epochs=matching.SIZES[bench.quick]["epochs"])
    return matching.place_of(usual, at, bench.seed)


def main(bench: ViewsBench) -> None:
    """Train, search, and compare the one matcher with each specialist in the specialist's view."""
    bench = fill_sizes(bench, SIZES[bench.quick])
    session.start(logical_cpus=4)
    hardware.keep_freed_memory()
    table = []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        rows = Rows(as_matching(bench), place_of(bench, at), bench.seed)
        minutes = {name: train_matcher(bench, rows, name) for name in bench.only or MATCHERS}
        if ALL not in minutes:
            return
        for width in WIDTHS:
            one = find(bench, rows, ALL, width)
            alone = f"{width:g} alone"
            other = find(bench, rows, alone, width) if alone in minutes else {}
            for heading, found in one.items():
                row = {
                    "view": f"{width:g} degrees, {heading}",
                    "one for all, R@1 %": describe_recall(found.rank),
                    "its heading error, degrees": found.error,
                }
                figures[f"{width:g}.{heading}"] = (found.rank == 0).double().mean().item()
                row |= dict.fromkeys(SPECIALIST, "")
                if other:
                    specialist = other[heading]
                    gain = (found.rank == 0).float() - (specialist.rank == 0).float()
                    low, high = metrics.bootstrap(gain)
                    difference = f"{100 * gain.mean():+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                    values = (describe_recall(specialist.rank), difference, specialist.error)
                    row |= dict(zip(SPECIALIST, values, strict=True))
                table.append(row)
    notes = [
        f"{bench.pairs} pairs, {bench.epochs} epochs each of G alone (CPU minutes: "
        + ", ".join(f"{name} {one:.1f}" for name, one in minutes.items())
        + f"); {min(GALLERY, bench.held_out)} held-out queries of other "
        "worlds among as many tiles. The one for all learns parts between 360 and 70 degrees wide, "
        "the others parts of one width, all in their places at random headings. "
        f"north: a view to the north, which is known; unknown: {bench.headings} headings are tried "
        "of a view that looks anywhere, and the best counts. Points of R@1 with 95 % bootstrap "
        "intervals, differences paired by query; ties against the query.",
    ]
    write_results(bench, "Views", table, figures, notes)


def describe_recall(rank: torch.Tensor) -> str:
    """Return R@1 in percent with its interval."""
    hits = (rank == 0).float()
    low, high = metrics.bootstrap(hits)
    return f"{100 * hits.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main(parse_flags(ViewsBench))
