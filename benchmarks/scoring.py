"""Exact scoring: a sum of cosines, and the joint score split, unsplit and by all towers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _harness import Bench, fill_sizes, parse_flags, write_results
from torch import Tensor, nn

from cvmatch.match.heads.branches import Features, SumScorer
from cvmatch.match.heads.joint import CHUNK, JointHeads, JointScorer
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.nn import metrics
from cvmatch.runtime import hardware, progress


@dataclass(frozen=True, kw_only=True)
class ScoringBench(Bench):
    """Pairs a second of one model (VGG16 towers, random weights), by three ways to score them."""

    tiles: int = 0
    """Tiles of the split form; 0: 100,000, quick 20,000."""
    queries: int = 0
    """Queries. 0: 8, quick 2."""
    unsplit: int = 0
    """Tiles of the unsplit layer; 0: 4,000, quick 1,000."""
    pairs: int = 0
    """Pairs for which all towers run; 0: 6, quick 2."""
    hidden: int = 256
    """Width of the heads."""
    rounds: int = 0
    """How often each runs, in turns; medians are reported. 0: 5, quick 3."""


def make_features(rows: int, width: int, seed: int) -> Tensor:
    """Of the towers' kind: standardised."""
    random = torch.Generator().manual_seed(seed)
    return nn.functional.layer_norm(torch.randn(rows, width, generator=random), (width,))


@torch.no_grad()
def score_unsplit(
    heads: JointHeads, embedding: Tensor, a: Tensor, c: Tensor, chunk: int = 512
) -> Tensor:
    """Scores by FFN_C's first layer on [a; c] of each pair, from stored tower features."""
    weight = torch.cat([heads.query_aerial_linear.weight, heads.tile_linear.weight], dim=1)
    rows = []
    for own, query in zip(a, embedding, strict=True):
        parts = []
        for tiles in c.split(chunk):
            both = torch.cat([own.expand(len(tiles), -1), tiles], dim=1)
            first = nn.functional.linear(both, weight, heads.query_aerial_linear.bias)
            parts.append(heads.candidate_mlp(first) @ query)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@torch.no_grad()
def score_with_all_towers(model: Matcher, pairs: int) -> Tensor:
    """Scores as the prototype's evaluation has them: every tower, once more for every pair."""
    assert isinstance(model.heads, JointHeads)
    side = model.config.tile_size
    scores = []
    for seed in range(pairs):
        random = torch.Generator().manual_seed(seed)
        ground = torch.rand(1, 3, *model.config.panorama, generator=random)
        synthetic, tile = torch.rand(2, 1, 3, side, side, generator=random)
        classes = torch.randint(0, 5, (1, side, side), generator=random).byte()
        query = model.embed_queries(ground, synthetic, classes)
        scores.append(JointScorer(model.heads)(query, model.embed_tiles(tile))[0])
    return torch.cat(scores)


def run_products(hidden: int, pairs: int, dtype: torch.dtype) -> None:
    """The two matrix products of the split form, alone."""
    x, weight = (
        torch.zeros(CHUNK["cpu"], hidden, dtype=dtype),
        torch.zeros(hidden, hidden).to(dtype),
    )
    out = torch.empty_like(x)
    for _ in range(2 * pairs // len(x)):
        torch.mm(x, weight, out=out)


def measure_seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def set_sizes(bench: ScoringBench) -> ScoringBench:
    """The sizes that were bench for, or the usual ones."""
    usual = {"tiles": 100_000, "queries": 8, "unsplit": 4000, "pairs": 6, "rounds": 5}
    if bench.quick:
        usual = {"tiles": 20_000, "queries": 2, "unsplit": 1000, "pairs": 2, "rounds": 3}
    return fill_sizes(bench, usual)


def main(bench: ScoringBench) -> None:
    """All ways in turns; then whether they agree."""
    bench = set_sizes(bench)
    hardware.keep_freed_memory()
    torch.manual_seed(0)
    model = Matcher(MatcherConfig(hidden=bench.hidden, score="joint")).eval()
    heads = model.heads
    assert isinstance(heads, JointHeads)
    width = model.aerial_tower.dim
    c, a = make_features(bench.unsplit, width, 1), make_features(bench.queries, width, 2)
    with torch.no_grad():
        ground, mask = (make_features(bench.queries, width, seed) for seed in (3, 4))
        query = heads.embed_queries(Features(ground, a, mask))
        tile = heads.embed_tiles(Features(aerial=c))
    embedding, joint = heads.split(query).embedding, JointScorer(heads)
    many = tile.repeat(-(-bench.tiles // len(tile)), 1)[: bench.tiles].half()
    cosines = SumScorer({"all": many.shape[1]})
    quick = hardware.fastest_dtype(torch.device("cpu"))
    pairs = bench.queries * bench.tiles
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "all towers for each pair": (
            bench.pairs,
            lambda: score_with_all_towers(model, bench.pairs),
        ),
        "stored features, unsplit layer": (
            bench.queries * bench.unsplit,
            lambda: score_unsplit(heads, embedding, a, c),
        ),
        "sum of cosines": (pairs, lambda: cosines(query, many)),
        "split, fp32": (pairs, lambda: joint(query, many)),
        "split, bf16": (pairs, lambda: joint(query, many, torch.bfloat16)),
        "products alone, fp32": (pairs, lambda: run_products(bench.hidden, pairs, torch.float32)),
        "products alone, bf16": (pairs, lambda: run_products(bench.hidden, pairs, torch.bfloat16)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with progress.watch("scoring", bench.rounds, lambda: len(times["products alone, bf16"])):
        for name, (_, work) in ways.items():
            measure_seconds(work)
            for _ in range(bench.rounds if name == "all towers for each pair" else 0):
                times[name].append(measure_seconds(work))
        for _ in range(bench.rounds):
            for name, (_, work) in list(ways.items())[1:]:
                times[name].append(measure_seconds(work))
    rate = {name: ways[name][0] / statistics.median(found) for name, found in times.items()}
    exact, split = (
        score_unsplit(heads, embedding, a, c),
        joint(query, tile),
    )
    half = joint(query, tile.half(), torch.bfloat16)
    write_report(bench, rate, exact, {"fp32": split, "bf16": half}, quick, query)


def write_report(
    bench: ScoringBench,
    rate: dict[str, float],
    exact: Tensor,
    found: dict[str, Tensor],
    quick: torch.dtype,
    query: Tensor,
) -> None:
    """The table, and how far the ways agree."""
    every = torch.arange(exact.shape[1])
    same = {
        name: torch.stack(
            [(metrics.ranks(row.expand(len(every), -1), every)
              == metrics.ranks(true.expand(len(every), -1), every)).double().mean()
             for row, true in zip(score, exact, strict=True)]
        ).mean().item()
        for name, score in found.items()
    }  # fmt: skip
    error = {name: (score - exact).abs().max().item() for name, score in found.items()}
    base = rate["all towers for each pair"]
    table = [
        {"way": name, "pairs/s": value, "times all towers": value / base}
        for name, value in rate.items()
    ]
    gemm = {kind: rate[f"split, {kind}"] / rate[f"products alone, {kind}"] for kind in found}
    notes = (
        f"VGG16 towers with random weights, heads {bench.hidden} wide, "
        f"{len(query)} queries, {torch.get_num_threads()} threads; medians of "
        f"{bench.rounds} rounds. Tiles are stored in half precision. "
        f"This CPU scores fastest in {str(quick).removeprefix('torch.')}.",
        f"Against the unsplit layer over {len(every)} tiles: largest error {error['fp32']:.1e} in "
        f"fp32 and {error['bf16']:.1e} in bf16 (tiles in half precision); equal ranks in "
        f"{100 * same['fp32']:.2f} % and {100 * same['bf16']:.1f} % of all (query, tile).",
        f"The two matrix products take {100 * gemm['fp32']:.0f} % of the split form's time in fp32 "
        f"and {100 * gemm['bf16']:.0f} % in bf16.",
    )
    figures = {
        "pairs_per_s.sum": rate["sum of cosines"],
        "pairs_per_s.split": rate["split, fp32"],
        "pairs_per_s.split_bf16": rate["split, bf16"],
        "pairs_per_s.unsplit": rate["stored features, unsplit layer"],
        "pairs_per_s.all_towers": base,
        "gemm_share": gemm["fp32"],
        "max_error": error["fp32"],
        "equal_ranks": same["fp32"],
    }
    write_results(bench, "Exact scoring", table, figures, notes)


if __name__ == "__main__":
    main(parse_flags(ScoringBench))
