"""Is an index what its manifest says, and does this version of cvmatch still make the same of it?

Hashes see changed files. They do not see that pictures are decoded or resized in another way than
when the index was built, nor codes that were made by something else: for that, `deep` embeds some
stored pictures again, and makes all codes again.
"""

import os
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from pyarrow import parquet

from cvmatch.data import schema
from cvmatch.index import remote, shard, versions
from cvmatch.index.reader import Index
from cvmatch.index.settings import Info, Verify
from cvmatch.index.writer import Draft, EncodeShard, shard_codes
from cvmatch.match.infer import EmbedTile
from cvmatch.match.model import fingerprint_parts

PROBES = 16
"""Tiles whose pictures are kept."""

TOLERANCE = 0.02
"""Largest distance of a probe's tile_proj, of its norm: half precision and another processor stay
below 0.002; another resampling filter is at 0.1 or more."""


def verify(config: Verify) -> dict[str, Any]:
    """What was checked, where everything is right.

    Raises:
        FileNotFoundError: no index there, or a file is missing.
        ValueError: the first thing that is wrong, and what to do.
    """
    index = Index.open(config.index, version=config.version, deep=config.deep)
    root, info = remote.root(config.index), index.manifest
    _check_ids(index, config.index)
    if (got := fingerprint_parts(index.heads)) != info["parts"]:
        raise ValueError(f"index {root}: expected a model of the parts {info['parts']}, got {got}.")
    for entry in info["shards"]:
        maker = shard.about(os.path.join(root, "shards", entry["sha"]))["maker"]
        if maker["tile"] != info["parts"]["tile"]:
            raise ValueError(
                f"index {root}: shard {entry['sha']} was embedded by the tower {maker['tile']}, "
                f"expected {info['parts']['tile']}. {_again(root)}"
            )
    found: dict[str, Any] = {"version": info["version"], "tiles": len(index) - len(index.dead)}
    found |= {"shards": len(info["shards"]), "checked_files": len(info["files"])}
    if config.deep:
        for entry in info["shards"]:
            _check_codes(root, info, entry)
        found["codes"] = len(index)
        found |= _check_probes(root, index)
    return found


def about(config: Info) -> dict[str, Any]:
    """The manifest. Raises as `versions.read`."""
    return versions.read(remote.fetched(config.index, config.version), config.version)


def probes_of(rows: pa.Table) -> pa.Table:
    """What is kept of some rows of tiles."""
    good = schema.good_rows(rows) if schema.ERROR in rows.column_names else rows
    return good.select([schema.PAIR_ID, schema.AERIAL]).slice(0, PROBES)


def living_probes(root: str, index: Index) -> pa.Table | None:
    """Probes of tiles that were not deleted; of one that came again, the picture may be another."""
    if not index.manifest["probes"]:
        return None
    kept, rows = _probes(root, index)
    return kept.filter(pa.array(~np.isin(rows, index.dead)))


def store_probes(work: Draft, probes: pa.Table | None) -> str | None:
    """Put them into place; gives the name of the file."""
    if probes is None or not len(probes):
        return None
    path = os.path.join(work.aside, "probes.parquet")
    parquet.write_table(probes, path)
    name, files = versions.place_file(work.root, path, "probes")
    work.files |= files
    return name


def _check_ids(index: Index, uri: str) -> None:
    ids = index.living_ids
    unique = len(ids.unique())
    if unique != len(ids):
        raise ValueError(
            f"index {uri}: expected each pair_id once, got {unique} of {len(ids)} tiles. "
            f"{_again(uri)}"
        )


def _check_codes(root: str, info: dict[str, Any], entry: dict[str, Any]) -> None:
    codes = shard_codes(EncodeShard(root, entry["sha"], info["coarse"], info["model"]))
    stored = faiss.read_index(os.path.join(root, entry["codes"]))
    made, kept = (faiss.serialize_index(one) for one in (codes, stored))
    if not np.array_equal(made, kept):
        raise ValueError(
            f"index {root}: the codes of shard {entry['sha']} are not what its tiles give with the "
            f"head {info['coarse']}. {_again(root)}"
        )


def _check_probes(root: str, index: Index) -> dict[str, Any]:
    if not index.manifest["probes"]:
        return {"probes": 0}
    kept, rows = _probes(root, index)
    if not len(kept):
        return {"probes": 0}
    batch = {name: kept[name].to_numpy() for name in (schema.PAIR_ID, schema.AERIAL)}
    batch[schema.ERROR] = np.full(len(kept), None)
    size = (index.manifest["made_from"] or {}).get("batch", len(kept))
    again = EmbedTile(index.heads, size)(batch)
    wanted = index.tile_proj.take(rows).astype(np.float64)
    apart = np.linalg.norm(again[shard.TILE_PROJ] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    if not (apart <= TOLERANCE).all():
        raise ValueError(
            f"index {root}: of {len(kept)} stored pictures {(apart > TOLERANCE).sum()} give other "
            f"numbers than when the index was built (apart by up to {apart.max():.3g} of their "
            f"norm, at most {TOLERANCE} is rounding): this machine decodes, resizes or computes "
            f"in another way. Install the versions of constraints.txt. {_again(root)}"
        )
    return {"probes": len(kept), "probes_apart": float(apart.max())}


def _probes(root: str, index: Index) -> tuple[pa.Table, Int64[np.ndarray, " probe"]]:
    """Probes whose row is there, and this row: the first of that id, since additions follow."""
    kept = parquet.read_table(os.path.join(root, index.manifest["probes"]))
    ids = index.tiles[schema.PAIR_ID]
    rows = np.array([ids.index(pair_id).as_py() for pair_id in kept[schema.PAIR_ID]], np.int64)
    return kept.filter(pa.array(rows >= 0)), rows[rows >= 0]


def _again(root: str) -> str:
    return f"Build the index again: jobs/build_index.py --output {root}"
