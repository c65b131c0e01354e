"""What a version will consist of, while it is made: files are put into place, none is published."""

import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Float32

from cvmatch.data import manifest
from cvmatch.index import ann, shard, shortlist_head, versions
from cvmatch.index.reader import TEMPLATE
from cvmatch.index.shard import Maker, Store
from cvmatch.index.shortlist_head import Head
from cvmatch.match.fusion import Fusion
from cvmatch.match.model import load_fusion
from cvmatch.runtime import hardware

T = TypeVar("T")
R = TypeVar("R")

Entry = dict[str, Any]
"""A shard in the manifest: its sha, its rows, the row at which it begins, and its codes."""

Run = Callable[[Callable[[T], R], Sequence[T]], list[R]]
"""Calls a function for each task, here or elsewhere; results in their order."""


def serially(function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
    """The `Run` of this process."""
    return [function(task) for task in tasks]


@contextlib.contextmanager
def draft(root: str, run: Run = serially) -> Iterator["Draft"]:
    """A draft of the index at `root`; what was not put into place is gone at the end."""
    os.makedirs(root, exist_ok=True)
    with _aside(root) as aside:
        yield Draft(root, aside, run)


class Draft:
    """Makes the parts of a version, and keeps the list of their files and their times."""

    def __init__(self, root: str, aside: str, run: Run) -> None:
        self.root, self.aside, self.run = root, aside, run
        self.files: versions.Files = {}
        self.seconds: dict[str, float] = {}

    def heads(self, model: str) -> str:
        """Copy the matcher; gives its fingerprint."""
        copy = shutil.copytree(os.path.expanduser(model), os.path.join(self.aside, "heads"))
        maker = manifest.fingerprint(copy)
        self.files |= versions.place(self.root, copy, f"heads/{maker}")
        return maker

    def shards(
        self, parts: str, tiles: pa.Table, width: int, maker: Maker, size: int
    ) -> list[Entry]:
        """Write the accepted `tiles` of embedded `parts` as shards of `size` rows.

        Raises:
            ValueError: see `shard.gather`.
        """
        cuts = range(0, len(tiles), size)
        tasks = [
            WriteShard(self.root, parts, tiles.slice(at, size).combine_chunks(), width, maker)
            for at in cuts
        ]
        with self.timed("shards"):
            return self.placed(self.run(write_shard, tasks))

    def placed(
        self, found: Sequence[tuple[str, int, versions.Files]], begin: int = 0
    ) -> list[Entry]:
        """Entries of shards (sha, rows, files), one behind the other from the row `begin` on."""
        entries = []
        for sha, rows, files in found:
            self.files |= files
            entries.append({"sha": sha, "rows": rows, "row_start": begin})
            begin += rows
        return entries

    def store(self, entries: Sequence[Entry]) -> Store:
        """tile_proj of shards."""
        folders = [os.path.join(self.root, "shards", entry["sha"]) for entry in entries]
        return Store([shard.read(folder, rereads=True)[0] for folder in folders])

    def template(self, head: Head, key: str, store: Store, seed: int) -> str:
        """Train the FAISS index of the head's vectors; gives the name of both in `coarse/`."""
        with self.timed("template"):
            width = vectors(head, store.take(np.arange(1))).shape[1]
            rows = drawn(len(store), ann.training(key, width), seed)
            index = ann.template(key, vectors(head, store.take(rows)))
            folder = os.path.join(self.aside, "coarse")
            head.save(folder)
            faiss.write_index(index, os.path.join(folder, TEMPLATE))
            name = manifest.digest(versions.files_of(folder, ""))[:16]
            self.files |= versions.place(self.root, folder, f"coarse/{name}")
        return name

    def codes(self, entries: Sequence[Entry], coarse_name: str, maker: str) -> list[Entry]:
        """Entries with the FAISS codes of each shard, which are made where they are missing."""
        missing = [entry for entry in entries if "codes" not in entry]
        tasks = [EncodeShard(self.root, entry["sha"], coarse_name, maker) for entry in missing]
        with self.timed("codes"):
            made = self.run(encode_shard, tasks)
        by_shard = {}
        for entry, (name, files) in zip(missing, made, strict=True):
            self.files |= files
            by_shard[entry["sha"]] = name
        return [{"codes": by_shard.get(entry["sha"]), **entry} for entry in entries]

    def merged(self, entries: Sequence[Entry], coarse_name: str) -> Entry:
        """Merge the codes of consecutive shards for searching; gives an entry of "ann"."""
        with self.timed("merge"):
            template = faiss.read_index(os.path.join(self.root, "coarse", coarse_name, TEMPLATE))
            paths = (os.path.join(self.root, one["codes"]) for one in entries)
            index = ann.merged(template, map(faiss.read_index, paths))
            name, files = _place_index(self.root, self.aside, index, "ann")
        rows = sum(entry["rows"] for entry in entries)
        if index.ntotal != rows:
            raise ValueError(f"index {self.root}: {index.ntotal} codes of {rows} tiles: corrupt.")
        self.files |= files
        return {"file": name, "rows": rows, "row_start": entries[0]["row_start"]}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to that of a stage."""
        begin = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begin


@dataclass(frozen=True)
class WriteShard:
    """The task of writing one shard."""

    root: str
    parts: str
    tiles: pa.Table
    width: int
    maker: Maker


def write_shard(task: WriteShard) -> tuple[str, int, versions.Files]:
    """Do it; gives name, rows and files. Doing it again ends in the same files."""
    tile_proj = shard.gather(task.parts, task.tiles[shard.AT].to_numpy(), task.width)
    return place_shard(task.root, tile_proj, task.tiles, task.maker)


def place_shard(
    root: str, tile_proj: Float16[np.ndarray, "tile width"], tiles: pa.Table, maker: Maker
) -> tuple[str, int, versions.Files]:
    """Write a shard and put it into place."""
    with _aside(root) as aside:
        folder = os.path.join(aside, "shard")
        sha = shard.write(folder, tile_proj, tiles, maker)
        return sha, len(tiles), versions.place(root, folder, f"shards/{sha}")


@dataclass(frozen=True)
class EncodeShard:
    """The task of making the FAISS codes of one shard."""

    root: str
    sha: str
    coarse: str
    maker: str


def encode_shard(task: EncodeShard) -> tuple[str, versions.Files]:
    """Do it; gives name and files. Their bytes do not depend on who does it."""
    index = shard_codes(task)
    with _aside(task.root) as aside:
        return _place_index(task.root, aside, index, "codes")


def shard_codes(task: EncodeShard) -> faiss.Index:
    """The codes."""
    tile_proj, _ = shard.read(os.path.join(task.root, "shards", task.sha), rereads=True)
    folder = os.path.join(task.root, "coarse", task.coarse)
    head = shortlist_head.load(folder, matcher(task.root, task.maker))
    template = faiss.read_index(os.path.join(folder, TEMPLATE))
    return ann.encoded(template, (vectors(head, part) for part in Store([tile_proj]).parts()))


@functools.lru_cache(maxsize=1)
def matcher(root: str, maker: str) -> Fusion:
    """The matcher in an index; a process that encodes many shards loads it once."""
    return load_fusion(os.path.join(root, "heads", maker), hardware.device())


@torch.inference_mode()
def vectors(head: Head, tile_proj: Float16[np.ndarray, "tile _"]) -> Float32[np.ndarray, "tile _"]:
    """The head's vectors of tiles, always computed in the same steps, on one thread: the last bits
    of a matrix product depend on both, and so would codes at the edge of a cell."""
    with hardware.one_thread():
        found = [
            head.tile(torch.from_numpy(part.astype(np.float32)).to(head.device)).cpu()
            for part in Store([tile_proj]).parts(_STEP)
        ]
    return torch.cat(found).float().numpy()


def drawn(rows: int, count: int, seed: int) -> np.ndarray:
    """At most `count` of `rows` rows, sorted."""
    chosen = np.random.default_rng(seed).choice(rows, min(count, rows), replace=False)
    return np.sort(chosen)


_STEP = 4096

ASIDE = ".aside-"
"""Begins the names of directories in which files are written before they are put into place."""


@contextlib.contextmanager
def _aside(root: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=root) as folder:
        yield folder


def _place_index(
    root: str, aside: str, index: faiss.Index, kind: str
) -> tuple[str, versions.Files]:
    path = os.path.join(aside, f"{kind}.faiss")
    faiss.write_index(index, path)
    return versions.place_file(root, path, kind)
