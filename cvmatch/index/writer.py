"""What a version will consist of, while it is made: files are put into place, none is published."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Float32, Int64

from cvmatch.data import manifest
from cvmatch.index import shard, versions
from cvmatch.index.manifest import AnnPartInfo, BytesPerTile, Files, IndexManifest, ShardInfo
from cvmatch.index.shard import ShardedArray
from cvmatch.index.shortlist import (
    EMPTY_INDEX,
    ShortlistHead,
    encode,
    load_head,
    merge_codes,
    train_empty_index,
    training_size,
)
from cvmatch.match.fusion import Fusion
from cvmatch.match.model import load_fusion
from cvmatch.runtime import hardware

T = TypeVar("T")
R = TypeVar("R")

TaskMapper = Callable[[Callable[[T], R], Sequence[T]], list[R]]
"""Calls a function for each task, here or elsewhere; results in their order."""

STAGING = ".staging-"
"""Begins the names of directories in which files are written before they are put into place."""

_STEP = 4096  # tiles whose vectors are computed at a time


def serial_map(function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
    """Call a function for each task in this process."""
    return [function(task) for task in tasks]


@contextlib.contextmanager
def open_writer(root: str, run: TaskMapper = serial_map) -> Iterator["IndexWriter"]:
    """Open a writer of the index at `root`; what was not put into place is gone at the end."""
    os.makedirs(root, exist_ok=True)
    with _staging_directory(root) as staging:
        yield IndexWriter(root, staging, run)


class IndexWriter:
    """Makes the parts of a version, and keeps the list of their files and their times."""

    def __init__(self, root: str, staging: str, run: TaskMapper) -> None:
        self.root, self.staging, self.run = root, staging, run
        self.files: Files = {}
        self.seconds: dict[str, float] = {}

    def copy_matcher(self, model: str) -> str:
        """Copy the matcher; return its fingerprint."""
        copy = shutil.copytree(os.path.expanduser(model), os.path.join(self.staging, "matcher"))
        fingerprint = manifest.fingerprint(copy)
        self.files |= versions.move_into_place(self.root, copy, f"matcher/{fingerprint}")
        return fingerprint

    def write_shards(
        self, parts: str, tiles: pa.Table, width: int, tower: str, size: int
    ) -> tuple[ShardInfo, ...]:
        """Write the good `tiles` of embedded `parts` as shards of `size` rows.

        Args:
            parts: directory of Parquet files.
            tiles: as `shard.select_good_rows` returns them.
            width: numbers of a tile projection.
            tower: fingerprint of what embedded the tiles.
            size: tiles of a shard.

        Raises:
            ValueError: see `shard.gather_projections`.
        """
        tasks = [
            WriteShardTask(self.root, parts, tiles.slice(row, size).combine_chunks(), width, tower)
            for row in range(0, len(tiles), size)
        ]
        with self.time_stage("shards"):
            return self.number_shards(self.run(write_shard, tasks))

    def number_shards(
        self, shards: Sequence[tuple[str, int, Files]], begin: int = 0
    ) -> tuple[ShardInfo, ...]:
        """Give shards (sha, rows, files) their rows, one behind the other from `begin` on."""
        numbered = []
        for sha, rows, files in shards:
            self.files |= files
            numbered.append(ShardInfo(sha, rows, begin))
            begin += rows
        return tuple(numbered)

    def open_projections(self, shards: Sequence[ShardInfo]) -> ShardedArray:
        """Memory-map the tile projections of shards."""
        folders = [os.path.join(self.root, "shards", info.sha) for info in shards]
        return ShardedArray([shard.open_shard(folder, rereads=True)[0] for folder in folders])

    def train_shortlist(
        self, head: ShortlistHead, key: str, tile_proj: ShardedArray, seed: int
    ) -> str:
        """Train the FAISS index of the head's vectors; return the name of both in `shortlist/`."""
        with self.time_stage("train"):
            width = compute_vectors(head, tile_proj.take(np.arange(1))).shape[1]
            rows = sample_rows(len(tile_proj), training_size(key, width), seed)
            index = train_empty_index(key, compute_vectors(head, tile_proj.take(rows)))
            folder = os.path.join(self.staging, "shortlist")
            head.save(folder)
            faiss.write_index(index, os.path.join(folder, EMPTY_INDEX))
            files = versions.hash_files(folder, "")
            plain = {file: dataclasses.asdict(info) for file, info in files.items()}
            name = manifest.digest(plain)[:16]
            self.files |= versions.move_into_place(self.root, folder, f"shortlist/{name}")
        return name

    def encode_shards(
        self, shards: Sequence[ShardInfo], shortlist_dir: str, model: str
    ) -> tuple[ShardInfo, ...]:
        """Make the FAISS codes of shards that have none."""
        missing = [info for info in shards if not info.codes]
        tasks = [EncodeShardTask(self.root, info.sha, shortlist_dir, model) for info in missing]
        with self.time_stage("codes"):
            encoded = self.run(encode_shard, tasks)
        codes = {info.sha: info.codes for info in shards}
        for info, (name, files) in zip(missing, encoded, strict=True):
            self.files |= files
            codes[info.sha] = name
        return tuple(dataclasses.replace(info, codes=codes[info.sha]) for info in shards)

    def merge_shards(self, shards: Sequence[ShardInfo], shortlist_dir: str) -> AnnPartInfo:
        """Merge the codes of consecutive shards for searching.

        Raises:
            ValueError: codes of another number of tiles, or see `merge_codes`.
        """
        with self.time_stage("merge"):
            folder = os.path.join(self.root, "shortlist", shortlist_dir)
            empty_index = faiss.read_index(os.path.join(folder, EMPTY_INDEX))
            paths = (os.path.join(self.root, info.codes) for info in shards)
            index = merge_codes(empty_index, map(faiss.read_index, paths))
            name, files = _store_faiss(self.root, self.staging, index, "ann")
        rows = sum(info.rows for info in shards)
        if index.ntotal != rows:
            raise ValueError(f"index {self.root}: {index.ntotal} codes of {rows} tiles: corrupt.")
        self.files |= files
        return AnnPartInfo(name, rows, shards[0].row_start)

    def publish(self, info: IndexManifest, rejected: Sequence[Mapping[str, str]]) -> IndexManifest:
        """Publish a version with its files, times and sizes; return its manifest.

        Raises:
            ValueError, FileNotFoundError: see `versions.commit`.
        """
        served = [n for n in self.files if n.startswith(("shards/", "ann/"))]
        total = sum(self.files[name].bytes for name in served)
        codes = sum(self.files[part.file].bytes for part in info.ann.parts)
        info = dataclasses.replace(
            info,
            rejected=info.rejected or len(rejected),
            seconds={stage: round(value, 3) for stage, value in self.seconds.items()},
            tiles_per_s={
                s: round(info.rows / value, 1) for s, value in self.seconds.items() if value
            },
            bytes_per_tile=BytesPerTile(round(total / info.rows, 2), round(codes / info.rows, 2)),
            files=self.files,
        )
        lines = "".join(json.dumps(row) + "\n" for row in rejected)
        return versions.commit(self.root, info, {"rejected.jsonl": lines.encode()})

    @contextlib.contextmanager
    def time_stage(self, stage: str) -> Iterator[None]:
        """Add the time of the block to that of a stage."""
        begin = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begin


@dataclass(frozen=True)
class WriteShardTask:
    """What it takes to write one shard."""

    root: str
    parts: str
    tiles: pa.Table
    width: int
    tower: str


def write_shard(task: WriteShardTask) -> tuple[str, int, Files]:
    """Write a shard; return name, rows and files. Doing it again ends in the same files."""
    rows = task.tiles[shard.PART_ROW].to_numpy()
    tile_proj = shard.gather_projections(task.parts, rows, task.width)
    return store_shard(task.root, tile_proj, task.tiles, task.tower)


def store_shard(
    root: str, tile_proj: Float16[np.ndarray, "tile width"], tiles: pa.Table, tower: str
) -> tuple[str, int, Files]:
    """Write a shard and move it into place; return name, rows and files."""
    with _staging_directory(root) as staging:
        folder = os.path.join(staging, "shard")
        sha = shard.write_shard_files(folder, tile_proj, tiles, tower)
        return sha, len(tiles), versions.move_into_place(root, folder, f"shards/{sha}")


@dataclass(frozen=True)
class EncodeShardTask:
    """What it takes to make the FAISS codes of one shard."""

    root: str
    sha: str
    shortlist_dir: str
    model: str


def encode_shard(task: EncodeShardTask) -> tuple[str, Files]:
    """Store the codes of a shard; return name and files. Their bytes do not depend on who does."""
    index = compute_codes(task)
    with _staging_directory(task.root) as staging:
        return _store_faiss(task.root, staging, index, "codes")


def compute_codes(task: EncodeShardTask) -> faiss.Index:
    """Make the codes of a shard."""
    tile_proj, _ = shard.open_shard(os.path.join(task.root, "shards", task.sha), rereads=True)
    folder = os.path.join(task.root, "shortlist", task.shortlist_dir)
    head = load_head(folder, load_matcher(task.root, task.model))
    empty_index = faiss.read_index(os.path.join(folder, EMPTY_INDEX))
    chunks = ShardedArray([tile_proj]).chunks()
    return encode(empty_index, (compute_vectors(head, chunk) for chunk in chunks))


@functools.lru_cache(maxsize=1)
def load_matcher(root: str, model: str) -> Fusion:
    """Load the matcher in an index; a process that encodes many shards loads it once."""
    return load_fusion(os.path.join(root, "matcher", model), hardware.device())


@torch.inference_mode()
def compute_vectors(
    head: ShortlistHead, tile_proj: Float16[np.ndarray, "tile _"]
) -> Float32[np.ndarray, "tile _"]:
    """Compute the head's vectors of tiles, always in the same steps and on one thread: the last
    bits of a matrix product depend on both, and so would codes at the edge of a cell."""
    with hardware.one_thread():
        vectors = [
            head.tile(torch.from_numpy(chunk.astype(np.float32)).to(head.device)).cpu()
            for chunk in ShardedArray([tile_proj]).chunks(_STEP)
        ]
    return torch.cat(vectors).float().numpy()


def sample_rows(rows: int, count: int, seed: int) -> Int64[np.ndarray, " row"]:
    """Choose at most `count` of `rows` rows, sorted."""
    chosen = np.random.default_rng(seed).choice(rows, min(count, rows), replace=False)
    return np.sort(chosen)


@contextlib.contextmanager
def _staging_directory(root: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=root) as folder:
        yield folder


def _store_faiss(root: str, staging: str, index: faiss.Index, folder: str) -> tuple[str, Files]:
    path = os.path.join(staging, f"{folder}.faiss")
    faiss.write_index(index, path)
    return versions.move_file_into_place(root, path, folder)
