"""A matcher of a few thousand random weights, rows of small pictures, and their parts and index."""

import dataclasses
import os
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from cvmatch.data import images, manifest, schema
from cvmatch.index import versions
from cvmatch.index.build import publish
from cvmatch.index.manifest import AnnInfo, IndexManifest
from cvmatch.index.reader import Index, rank
from cvmatch.index.settings import BuildIndex, Mode
from cvmatch.match.heads.joint import JointHeads
from cvmatch.match.infer import EmbedTile
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.match.settings import Branch
from cvmatch.nn.backbones import TowerSpec
from tests.helpers import matcher as joint

TOWER = TowerSpec(arch="shufflenet_v2_x0_5")  # small, and made without a large classifier


BRANCHES: tuple[Branch, ...] = ("direct", "aerial")


def matcher(directory: str, seed: int = 0, **changes: Any) -> str:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"hidden": 8, "branches": BRANCHES} | changes
    config = MatcherConfig(
        ground=TOWER, aerial=TOWER, mask=TOWER, panorama=(16, 64), tile_size=32,
        **fields,
    )  # fmt: skip
    model = Matcher(config)
    if isinstance(model.heads, JointHeads):
        joint.wake(model.heads)
    _calibrate(model)
    model.save(directory)
    return directory


@torch.no_grad()
def _calibrate(model: Matcher) -> None:
    """Give batch normalisation the statistics of such pictures: else all features are alike."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    rng = np.random.default_rng(5)
    ground, tile = (
        torch.from_numpy(np.stack([picture(rng, *size) for _ in range(32)])).permute(0, 3, 1, 2)
        for size in ((16, 64), (32, 32))
    )
    ids = torch.from_numpy(rng.integers(0, 5, (32, 4, 4), dtype=np.uint8).repeat(8, 1).repeat(8, 2))
    model.train()
    model.query_features(ground.float() / 255, None, ids)
    model.tile_features(tile.float() / 255)


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blocks of colour: pictures that differ in more than noise."""
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def rows(count: int, seed: int = 0) -> pa.Table:
    """Synthesized rows "0000000", ...; each 0.01 degrees (1,112 m) north of the one before.

    A row depends on its number alone, so that `rows(6)` are the first of `rows(24)`.
    """
    return pa.Table.from_pylist([_row(number, seed) for number in range(count)], schema.SYNTHESIZED)


def _row(number: int, seed: int) -> dict[str, object]:
    rng = np.random.default_rng((seed, number))
    ids = rng.integers(0, 5, (4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return {
        schema.PAIR_ID: f"{number:07d}",
        schema.GROUND: images.encode(picture(rng, 16, 64)),
        schema.AERIAL: images.encode(picture(rng, 32, 32)),
        schema.CLASSES: images.encode(images.colours_of(ids)),
        schema.SYNTHETIC: images.encode(picture(rng, 32, 32)),
        schema.SYNTHETIC_CLASSES: images.encode(ids),
        schema.LATITUDE: 0.01 * number,
        schema.LONGITUDE: 0.0,
    }


def write(table: pa.Table, directory: str) -> str:
    os.makedirs(directory, exist_ok=True)
    parquet.write_table(table, os.path.join(directory, "part-0.parquet"))
    manifest.write(directory, rows=len(table), config=BuildIndex(), models={}, source="test")
    return directory


def columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in table.column_names}


def parts(table: pa.Table, model: str, directory: str) -> str:
    """What the pool writes for these rows, as two files, in an order of their own."""
    embedded = EmbedTile(model, 8)(columns(table))
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(embedded["tile_vector"].reshape(-1)), embedded["tile_vector"].shape[1]
    )
    names = (schema.PAIR_ID, schema.LATITUDE, schema.LONGITUDE)
    done = table.select(names).append_column("tile_vector", vectors)
    done = done.append_column(schema.ERROR, pa.array(embedded[schema.ERROR], pa.string()))
    return write_parts(done.take(np.random.default_rng(1).permutation(len(done))), directory)


def write_parts(done: pa.Table, directory: str) -> str:
    os.makedirs(directory)
    half = len(done) // 2
    parquet.write_table(done[:half], os.path.join(directory, "a.parquet"))
    parquet.write_table(done[half:], os.path.join(directory, "b.parquet"))
    return directory


def index(folder: str, count: int = 24, **changes: Any) -> Index:
    """An index of `rows(count)` under `folder`, by a `matcher` of these changes, without Ray."""
    model = matcher(os.path.join(folder, "model"), **changes)
    found = parts(rows(count), model, os.path.join(folder, "parts"))
    output = os.path.join(folder, "index")
    publish(found, BuildIndex(model=model, output=output))
    return Index.open(output)


def queries(count: int = 3, seed: int = 0) -> torch.Tensor:
    """Random queries of the width of `matcher`."""
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 16, generator=random), dim=1)


def find_ids(index: Index, mode: Mode, top_k: int = 24) -> list[list[str]]:
    """The ids of the best tiles of some queries."""
    rows = rank(index, queries(), top_k, mode).rows
    names = index.tiles[schema.PAIR_ID].to_pylist()
    return [[names[row] for row in best if row >= 0] for best in rows]


def manifest_of(**fields: Any) -> IndexManifest:
    """A manifest of no tiles."""
    empty = IndexManifest(
        rows=0, width=16, preprocess="", model="", model_parts={}, config={}, shard_rows=1,
        shards=(), ann=AnnInfo("Flat", 1), shortlist=0,
    )  # fmt: skip
    return dataclasses.replace(empty, **fields)


def change_manifest(output: str, manifest: IndexManifest, **fields: Any) -> None:
    """Make a manifest with other fields the current one."""
    fields["parent"] = versions.current_version(output)
    versions.commit(output, dataclasses.replace(manifest, **fields), {})
