"""Is an index what its manifest says, and does this version of cvmatch still make the same of it?

Hashes see changed files. They do not see that pictures are decoded or resized in another way than
when the index was built, nor codes that were made by something else: for that, `deep` embeds some
stored pictures again, and makes all codes again.
"""

import os
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from pyarrow import parquet

from cvmatch.data import schema
from cvmatch.data.schema import TILE_VECTOR
from cvmatch.index import shard, versions
from cvmatch.index.manifest import IndexManifest, ShardInfo
from cvmatch.index.reader import Index
from cvmatch.index.settings import Info, Verify
from cvmatch.index.writer import EncodeShardTask, IndexWriter, compute_codes
from cvmatch.match.infer import EmbedTile
from cvmatch.match.model import fingerprint_parts

CHECK_SAMPLES = 16
"""Tiles whose pictures are stored."""

TOLERANCE = 0.02
"""Largest distance of a check sample's vector, of its norm: docs/decisions.md#check-samples"""


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was checked, where everything is right; what was not asked for is None."""

    version: str
    tiles: int
    """Tiles that were not deleted."""
    shards: int
    files: int
    """Files whose size, and of small ones whose hash, is right."""
    codes: int | None = None
    """Tiles whose codes were made again."""
    check_samples: int | None = None
    """Tiles that were embedded again."""
    largest_distance: float | None = None
    """Of their vectors, of the norm."""


def verify(config: Verify) -> VerifyResult:
    """Check an index.

    Raises:
        FileNotFoundError: no index there, or a file is missing.
        ValueError: the first thing that is wrong, and what to do.
    """
    index = Index.open(config.index, version=config.version, deep=config.deep)
    root, info = versions.local_root(config.index), index.manifest
    _check_ids(index, config.index)
    if (got := fingerprint_parts(index.matcher_dir)) != info.model_parts:
        raise ValueError(
            f"index {root}: expected a model of the parts {info.model_parts}, got {got}."
        )
    for part in info.shards:
        tower = shard.read_tower(os.path.join(root, "shards", part.sha))
        if tower != info.tower:
            raise ValueError(
                f"index {root}: shard {part.sha} was embedded by the tower {tower}, expected "
                f"{info.tower}. {_advise(root)}"
            )
    samples = distance = None
    if config.deep:
        for part in info.shards:
            _check_codes(root, info, part)
        samples, distance = _check_samples(root, index)
    return VerifyResult(
        version=info.version,
        tiles=len(index) - len(index.deleted),
        shards=len(info.shards),
        files=len(info.files),
        codes=len(index) if config.deep else None,
        check_samples=samples,
        largest_distance=distance,
    )


def read_info(config: Info) -> IndexManifest:
    """Read the manifest of an index. Raises as `versions.read_version`."""
    return versions.read_version(versions.fetch(config.index, config.version), config.version)


def select_check_samples(rows: pa.Table) -> pa.Table:
    """Return what is stored of some rows of tiles."""
    good = schema.good_rows(rows) if schema.ERROR in rows.column_names else rows
    return good.select([schema.PAIR_ID, schema.AERIAL]).slice(0, CHECK_SAMPLES)


def live_check_samples(root: str, index: Index) -> pa.Table | None:
    """Return the check samples of tiles that were not deleted: one that came again may differ."""
    if not index.manifest.check_samples:
        return None
    samples, rows = _read_check_samples(root, index)
    return samples.filter(pa.array(~np.isin(rows, index.deleted)))


def store_check_samples(writer: IndexWriter, samples: pa.Table | None) -> str | None:
    """Move check samples into place; return the name of the file."""
    if samples is None or not len(samples):
        return None
    path = os.path.join(writer.staging, "check_samples.parquet")
    parquet.write_table(samples, path)
    name, files = versions.move_file_into_place(writer.root, path, "check_samples")
    writer.files |= files
    return name


def _check_ids(index: Index, uri: str) -> None:
    ids = index.live_ids
    unique = len(ids.unique())
    if unique != len(ids):
        raise ValueError(
            f"index {uri}: expected each pair_id once, got {unique} of {len(ids)} tiles. "
            f"{_advise(uri)}"
        )


def _check_codes(root: str, info: IndexManifest, part: ShardInfo) -> None:
    codes = compute_codes(EncodeShardTask(root, part.sha, info.shortlist_dir))
    stored = faiss.read_index(os.path.join(root, part.codes))
    if not np.array_equal(faiss.serialize_index(codes), faiss.serialize_index(stored)):
        raise ValueError(
            f"index {root}: the codes of shard {part.sha} are not what the codebooks "
            f"{info.shortlist_dir} make of its tiles. {_advise(root)}"
        )


def _check_samples(root: str, index: Index) -> tuple[int, float | None]:
    """Embed the check samples again; return how many there are, and the largest distance."""
    if not index.manifest.check_samples:
        return 0, None
    samples, rows = _read_check_samples(root, index)
    if not len(samples):
        return 0, None
    batch = {name: samples[name].to_numpy() for name in (schema.PAIR_ID, schema.AERIAL)}
    batch[schema.ERROR] = np.full(len(samples), None)
    origin = index.manifest.tile_origin
    again = EmbedTile(index.matcher_dir, origin.batch if origin else len(samples))(batch)
    stored = index.vectors.take(rows).astype(np.float64)
    distance = np.linalg.norm(again[TILE_VECTOR] - stored, axis=1)
    distance /= np.linalg.norm(stored, axis=1)
    if not (distance <= TOLERANCE).all():
        raise ValueError(
            f"index {root}: of {len(samples)} stored pictures {(distance > TOLERANCE).sum()} have "
            f"other numbers than when the index was built (apart by up to {distance.max():.3g} of "
            f"their norm, at most {TOLERANCE} is rounding): this machine decodes, resizes or "
            f"computes in another way. Install the versions of constraints.txt. {_advise(root)}"
        )
    return len(samples), float(distance.max())


def _read_check_samples(root: str, index: Index) -> tuple[pa.Table, Int64[np.ndarray, " sample"]]:
    """Read those whose row is there, and this row: the first of that id, since additions follow."""
    samples = parquet.read_table(os.path.join(root, index.manifest.check_samples or ""))
    ids = index.tiles[schema.PAIR_ID]
    rows = np.array([ids.index(pair_id).as_py() for pair_id in samples[schema.PAIR_ID]], np.int64)
    return samples.filter(pa.array(rows >= 0)), rows[rows >= 0]


def _advise(root: str) -> str:
    return f"Build the index again: cvmatch build-index --output {root}"
