"""What a version will consist of, while it is made: files are put into place, none is published."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Int64, UInt64

from cvmatch.data import manifest, storage
from cvmatch.data.tables import Reject
from cvmatch.index import shard, versions
from cvmatch.index.manifest import (
    AnnPartInfo,
    BytesPerTile,
    Files,
    IdenticalTiles,
    IndexManifest,
    ShardInfo,
)
from cvmatch.index.shard import ShardedArray
from cvmatch.index.shortlist import (
    EMPTY_INDEX,
    encode,
    merge_codes,
    train_empty_index,
    training_size,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

TaskMapper = Callable[[Callable[[T], R], Sequence[T]], list[R]]
"""Calls a function for each task, here or elsewhere; results in their order."""

STAGING = ".staging-"
"""Begins the names of directories in which files are written before they are put into place."""

NAMED_GROUPS, NAMED_TILES = 3, 3
"""Groups of identical tiles that a manifest names, and tiles of each."""

_STEP = 16_384  # tiles whose codes are made at a time


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
        copy = os.path.join(self.staging, "matcher")
        shutil.copytree(storage.local_directory(model), copy)
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
            width: numbers of a tile's vector.
            tower: fingerprint of what embedded the tiles.
            size: tiles of a shard.

        Raises:
            ValueError: see `shard.gather_vectors`.
        """
        tasks = [
            WriteShardTask(self.root, parts, tiles.slice(row, size).combine_chunks(), width, tower)
            for row in range(0, len(tiles), size)
        ]
        with self.time_stage("shards"):
            return self.number_shards(self.run(write_shard, tasks))

    def find_identical(
        self, shards: Sequence[ShardInfo], ids: pa.ChunkedArray
    ) -> tuple[int, tuple[IdenticalTiles, ...]]:
        """Count the tiles whose vector others have, too; return their number, and largest groups.

        A warning names the largest. `ids` are those of the shards' tiles.
        """
        folders = [os.path.join(self.root, "shards", info.sha) for info in shards]
        with self.time_stage("identical"):
            hashes = np.concatenate([np.empty(0, np.uint64), *self.run(hash_shard, folders)])
            _, first, inverse, counts = np.unique(
                hashes, return_index=True, return_inverse=True, return_counts=True
            )
        total = int(counts[counts > 1].sum())
        groups = []
        for group in np.lexsort((first, -counts))[:NAMED_GROUPS]:
            if counts[group] > 1:
                rows = np.flatnonzero(inverse == group)[:NAMED_TILES]
                names = tuple(ids.take(pa.array(rows)).to_pylist())
                groups.append(IdenticalTiles(int(counts[group]), names))
        if groups:
            _log.warning(
                "%d of %d tiles are identical to others, such as %d like %s: no search tells them "
                "apart. Leave out tiles without imagery.",
                total, len(hashes), groups[0].tiles, list(groups[0].pair_ids),
            )  # fmt: skip
        return total, tuple(groups)

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

    def open_vectors(self, shards: Sequence[ShardInfo]) -> ShardedArray:
        """Memory-map the vectors of shards."""
        folders = [os.path.join(self.root, "shards", info.sha) for info in shards]
        return ShardedArray([shard.open_shard(folder, rereads=True)[0] for folder in folders])

    def train_shortlist(self, key: str, vectors: ShardedArray, width: int, seed: int) -> str:
        """Train the FAISS index of the vectors' first `width` numbers; return its name."""
        with self.time_stage("train"):
            rows = sample_rows(len(vectors), training_size(key, width), seed)
            index = train_empty_index(key, vectors.take(rows)[:, :width].astype(np.float32))
            folder = os.path.join(self.staging, "shortlist")
            os.makedirs(folder)
            faiss.write_index(index, os.path.join(folder, EMPTY_INDEX))
            files = versions.hash_files(folder, "")
            plain = {file: dataclasses.asdict(info) for file, info in files.items()}
            name = manifest.digest(plain)[:16]
            self.files |= versions.move_into_place(self.root, folder, f"shortlist/{name}")
        return name

    def encode_shards(
        self, shards: Sequence[ShardInfo], shortlist_dir: str
    ) -> tuple[ShardInfo, ...]:
        """Make the FAISS codes of shards that have none."""
        missing = [info for info in shards if not info.codes]
        tasks = [EncodeShardTask(self.root, info.sha, shortlist_dir) for info in missing]
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

    def publish(self, info: IndexManifest, rejected: Sequence[Reject]) -> IndexManifest:
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
    vectors = shard.gather_vectors(task.parts, rows, task.width)
    return store_shard(task.root, vectors, task.tiles, task.tower)


def store_shard(
    root: str, vectors: Float16[np.ndarray, "tile width"], tiles: pa.Table, tower: str
) -> tuple[str, int, Files]:
    """Write a shard and move it into place; return name, rows and files."""
    with _staging_directory(root) as staging:
        folder = os.path.join(staging, "shard")
        sha = shard.write_shard_files(folder, vectors, tiles, tower)
        return sha, len(tiles), versions.move_into_place(root, folder, f"shards/{sha}")


def hash_shard(folder: str) -> UInt64[np.ndarray, " tile"]:
    """Hash the vector of each tile of a shard."""
    vectors, _ = shard.open_shard(folder, rereads=True)
    odd = np.random.default_rng(0).integers(0, 2**63, vectors.shape[1], np.uint64) * 2 + 1
    chunks = ShardedArray([vectors]).chunks(_STEP)
    hashes = [(chunk.view(np.uint16).astype(np.uint64) * odd).sum(1) for chunk in chunks]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


@dataclass(frozen=True)
class EncodeShardTask:
    """What it takes to make the FAISS codes of one shard."""

    root: str
    sha: str
    shortlist_dir: str


def encode_shard(task: EncodeShardTask) -> tuple[str, Files]:
    """Store the codes of a shard; return name and files. Their bytes do not depend on who does."""
    index = compute_codes(task)
    with _staging_directory(task.root) as staging:
        return _store_faiss(task.root, staging, index, "codes")


def compute_codes(task: EncodeShardTask) -> faiss.Index:
    """Make the codes of a shard."""
    vectors, _ = shard.open_shard(os.path.join(task.root, "shards", task.sha), rereads=True)
    folder = os.path.join(task.root, "shortlist", task.shortlist_dir)
    empty_index = faiss.read_index(os.path.join(folder, EMPTY_INDEX))
    chunks = ShardedArray([vectors]).chunks(_STEP)
    return encode(empty_index, (chunk[:, : empty_index.d].astype(np.float32) for chunk in chunks))


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
