"""A million tiles: our shortlist against HNSW, IVF-Flat and exact scoring, on the same vectors."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import _memory
import faiss
import numpy as np
import pyarrow as pa
import torch
from _harness import Bench, fill_sizes, parse_flags, write_results
from jaxtyping import Float16
from matching import MatchingBench, Rows, make_config
from pyarrow import parquet
from torch import Tensor

from cvmatch.data import schema, tables
from cvmatch.data.schema import TILE_VECTOR
from cvmatch.index import embedding
from cvmatch.index.build import publish
from cvmatch.index.embedding import sample_queries
from cvmatch.index.manifest import IndexManifest
from cvmatch.index.reader import Index, rank
from cvmatch.index.settings import BuildIndex, Mode
from cvmatch.match.infer import EmbedTile
from cvmatch.match.train import train
from cvmatch.runtime import pools, progress, session


@dataclass(frozen=True, kw_only=True)
class MillionTilesBench(Bench):
    """Build time, bytes, milliseconds and recall of the exact answers."""

    tiles: int = 0
    """Tiles; 0: 1,000,000, quick 110,000."""
    matcher: str = ""
    """Trained matcher; empty: one is trained for a minute, with the true tiles as A."""
    queries: str = ""
    """Synthesized rows (of its held-out places) for it; empty: those of that training."""
    more: str = ""
    """More such rows, whose tiles are a base for the synthetic ones too."""
    bench: int = 0
    """Queries that are measured; 0: 100, quick 40."""
    rivals: bool = True
    """Measure HNSW32 and IVF-Flat too, which need all vectors in memory, in fp32."""


ROUNDS = 3
"""How often each query is timed."""


@dataclass(frozen=True)
class Contender:
    """A shortlist."""

    name: str
    build_s: float
    size: int
    near: Callable[[Tensor], np.ndarray]


def train_matcher(at: str) -> tuple[str, str]:
    """A matcher after some epochs on few pairs, and its held-out rows."""
    bench = MatchingBench(quick=True, pairs=240, held_out=120, epochs=3)
    rows = Rows(bench, at)
    config = make_config(bench, rows.true, {}, at)
    train(config)
    return config.output, f"{rows.true}/val"


def embed_real_tiles(model: str, locations: list[str]) -> Float16[np.ndarray, "tile width"]:
    """Vectors of the tiles of synthesized rows."""
    embed, found = EmbedTile(model, 32), []
    columns = [schema.PAIR_ID, schema.AERIAL, schema.ERROR]
    for location in locations:
        for table in tables.batches(location, columns):
            found.append(embed({name: table[name].to_numpy() for name in columns})[TILE_VECTOR])
    return np.concatenate(found)


def make_synthetic_tiles(
    base: Float16[np.ndarray, "tile width"], count: int, seed: int, step: int = 50_000
) -> Iterator[Float16[np.ndarray, "_ width"]]:
    """First the real ones; then mixtures of two of them (the first weighs a half to one), about
    their mean, brought to the spread that they have."""
    rng = np.random.default_rng(seed)
    yield base[:count]
    whole = base.astype(np.float32)
    mean = whole.mean(axis=0)
    for begin in range(len(base), count, step):
        size = min(step, count - begin)
        one, other = rng.integers(0, len(base), (2, size))
        share = rng.uniform(0.5, 1.0, (size, 1)).astype(np.float32)
        mixed = share * (whole[one] - mean) + (1 - share) * (whole[other] - mean)
        yield (mean + mixed / np.sqrt(share**2 + (1 - share) ** 2)).astype(np.float16)


def write_parts(chunks: Iterator[np.ndarray], location: str) -> str:
    """Vectors as the pool writes them."""
    os.makedirs(location)
    begin = 0
    for number, vectors in enumerate(chunks):
        ids = [f"{row:09d}" for row in range(begin, begin + len(vectors))]
        degrees = pa.array(np.arange(begin, begin + len(vectors)) * 1e-5)
        table = pa.table(
            {
                schema.PAIR_ID: ids,
                schema.LATITUDE: degrees,
                schema.LONGITUDE: degrees,
                TILE_VECTOR: pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.reshape(-1)), vectors.shape[1]
                ),
                schema.ERROR: pa.nulls(len(vectors), pa.string()),
            }
        )
        parquet.write_table(table, f"{location}/part-{number:05d}.parquet")
        begin += len(vectors)
    return location


def measure_faiss_size(index: faiss.Index) -> int:
    """Bytes of an index on disk."""
    return len(faiss.serialize_index(index))


def list_contenders(index: Index, count: int) -> Iterator[Contender]:
    """HNSW32 and IVF-Flat over the same vectors, one after the other."""
    width = index.scorer.shortlist_width
    tile = np.concatenate([part[:, :width].astype(np.float32) for part in index.vectors.chunks()])
    lists = int(4 * len(tile) ** 0.5)
    for name, key, set_search in (
        ("IVF-Flat", f"IVF{lists},Flat", lambda one: setattr(one, "nprobe", 64)),
        ("HNSW32", "HNSW32", lambda one: setattr(one.hnsw, "efSearch", max(256, count))),
    ):
        made = faiss.index_factory(tile.shape[1], key, faiss.METRIC_INNER_PRODUCT)
        done = [0]
        with progress.watch(f"build {name}", len(tile), lambda done=done: done[0]):
            begin = time.perf_counter()
            if not made.is_trained:
                made.train(tile[:: max(1, len(tile) // (50 * lists))])
            for at in range(0, len(tile), 20_000):
                made.add(tile[at : at + 20_000])
                done[0] = made.ntotal
            seconds = time.perf_counter() - begin
        set_search(made)

        def near(query: Tensor, made: faiss.Index = made) -> np.ndarray:
            return made.search(query[:, :width].numpy(), count)[1]

        yield Contender(name, seconds, measure_faiss_size(made), near)
        del made
        gc.collect()


@torch.inference_mode()
def rerank(index: Index, query: Tensor, near: np.ndarray) -> np.ndarray:
    """The ten best of a shortlist, by exact scores."""
    own = near[0][near[0] >= 0]
    best = index.score_rows(query, own)[0].topk(min(10, len(own))).indices
    return own[best.numpy()]


@torch.inference_mode()
def measure(
    index: Index, queries: Tensor, exact: np.ndarray, search: Callable[[Tensor], np.ndarray]
) -> dict[str, float]:
    """Milliseconds of one query at a time with the second stage, and what it keeps of the exact."""
    times, top1, top10 = [], [], []
    for at in [*range(len(exact))] * ROUNDS:
        query = queries[at : at + 1]
        begin = time.perf_counter()
        found = search(query)
        times.append(1000 * (time.perf_counter() - begin))
        top1.append(exact[at, 0] in found)
        top10.append(np.isin(exact[at], found).mean())
    return {
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "recall_exact_top1": float(np.mean(top1)),
        "recall_exact_top10": float(np.mean(top10)),
    }


def measure_throughput(index: Index, queries: Tensor, mode: Mode) -> float:
    """Queries a second, all in one call."""
    some = queries[:16] if mode == "exact" else queries
    begin = time.perf_counter()
    rank(index, some, 10, mode)
    return len(some) / (time.perf_counter() - begin)


def measure_private_memory(root: str, queries: Tensor, at: str) -> dict[str, float]:
    """Private memory of a process that opens the index and answers, and its opening in ms."""
    place = f"{at}/queries.pt"
    torch.save(queries, place)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_search_memory.py")
    command = [sys.executable, script, root, place]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def main(bench: MillionTilesBench) -> None:
    """Build, measure, and compare."""
    sizes = {"tiles": 110_000, "bench": 40} if bench.quick else {"tiles": 1_000_000, "bench": 100}
    bench = fill_sizes(bench, sizes)
    session.start(logical_cpus=2)
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        model, location = (
            (bench.matcher, bench.queries) if bench.matcher else train_matcher(f"{at}/trained")
        )
        base = embed_real_tiles(model, [one for one in (location, bench.more) if one])
        parts = write_parts(make_synthetic_tiles(base, bench.tiles, seed=0), f"{at}/parts")
        embedding.RECALL_QUERIES = bench.bench
        config = BuildIndex(
            model=model,
            output=f"{at}/index",
            queries=location,
        )
        with _memory.watch_memory("Pss_Anon") as whole:
            info = publish(parts, config, pools.map_tasks)
        few = write_parts(make_synthetic_tiles(base, bench.tiles // 10, seed=0), f"{at}/few")
        with _memory.watch_memory("Pss_Anon") as tenth:
            publish(few, replace(config, output=f"{at}/tenth"), pools.map_tasks)
        peaks = tenth.mib, whole.mib
        index = Index.open(f"{at}/index")
        queries = sample_queries(location, model, 0)
        assert queries
        write_report(bench, index, info, queries.vectors, len(base), peaks, at)


def write_report(
    bench: MillionTilesBench,
    index: Index,
    info: IndexManifest,
    query: Tensor,
    base: int,
    peaks: tuple[float, float],
    at: str,
) -> None:
    """Measure all, one after the other, and write the table."""
    count = info.shortlist
    exact, times = [], []
    for row in range(len(query)):
        begin = time.perf_counter()
        exact.append(rank(index, query[row : row + 1], 10, "exact").rows)
        times.append(1000 * (time.perf_counter() - begin))
    exact = np.concatenate(exact)
    stages = info.seconds
    assert info.bytes_per_tile
    own_s = stages["train"] + stages["codes"] + stages["merge"]
    found = {
        "ours": {"build_s": own_s, "bytes_per_tile": info.bytes_per_tile.ann}
        | measure(index, query, exact, lambda one: rank(index, one, 10, "two-stage").rows[0]),
        "exact": {
            "build_s": 0.0,
            "bytes_per_tile": 0.0,
            "p50_ms": float(np.percentile(times, 50)),
            "p99_ms": float(np.percentile(times, 99)),
            "recall_exact_top1": 1.0,
            "recall_exact_top10": 1.0,
        },
    }
    speeds = {mode: measure_throughput(index, query, mode) for mode in ("two-stage", "exact")}
    memory = measure_private_memory(f"{at}/index", query, at)
    for rival in list_contenders(index, count) if bench.rivals else ():
        found[rival.name] = {
            "build_s": rival.build_s,
            "bytes_per_tile": rival.size / bench.tiles,
        } | measure(
            index, query, exact, lambda one, rival=rival: rerank(index, one, rival.near(one))
        )
    table = [{"shortlist": name, **values} for name, values in found.items()]
    figures = {f"{n}.{key}": value for n, row in found.items() for key, value in row.items()}
    figures |= {f"stage_s.{name}": value for name, value in stages.items()}
    figures |= {f"queries_per_s.{mode}": value for mode, value in speeds.items()}
    figures |= {f"search.{name}": value for name, value in memory.items()}
    figures |= {"build_peak_mib.tenth": peaks[0], "build_peak_mib.whole": peaks[1]}
    if "HNSW32" in found:
        hnsw, ours = found["HNSW32"], found["ours"]
        figures["times_smaller"] = hnsw["bytes_per_tile"] / ours["bytes_per_tile"]
        figures["times_faster_to_build"] = hnsw["build_s"] / ours["build_s"]
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
    notes = (
        f"{bench.tiles} tiles: {base} real ones, the rest mixtures of two of them about their mean "
        f"with the spread that these have; vectors of {info.width} numbers in half precision "
        f"(beside the shortlist, {2 * info.width} bytes a tile). "
        f"{len(query)} queries of the fullest modality whose tiles are "
        f"among the real ones. All shortlists hold the same vectors, give {count} tiles, and have "
        "the same exact second stage, whose time is in the milliseconds. Recall is of the exact "
        "answers.",
        f"Ours: {info.ann.key}, packed; built in shards, with the training and the merge. The "
        "rivals are given the vectors in memory. HNSW32 "
        "is what autofaiss chooses at this size; "
        "efSearch is the number of tiles that it is asked for.",
        f"Seconds of the build, two tasks of Ray at a time: {seconds} (embed: none). Peak memory "
        "of the build, over this process and Ray's, without mapped files: "
        f"{peaks[1]:.0f} MiB, and {peaks[0]:.0f} MiB with a tenth of the tiles.",
        f"All {len(query)} queries (exact: 16) in one call: "
        f"{speeds['two-stage']:.0f} a second in two stages, {speeds['exact']:.2f} exact. "
        f"A process that opened the index (in "
        f"{memory['open_ms']:.0f} ms, of it {memory['check_ms']:.0f} ms for checks) and answered: "
        f"{memory['private_mib']:.0f} MiB private, of which {memory['imports_mib']:.0f} MiB are "
        "what importing the libraries writes. One forked from a process that has imported them, "
        f"as those of a service are: {memory['forked_mib']:.0f} MiB.",
    )
    write_results(bench, "A million tiles", table, figures, notes)


if __name__ == "__main__":
    main(parse_flags(MillionTilesBench))
