"""What each branch of a trained matcher is worth: alone, left out, S besides, by weights and noise.

On the matcher "sum (default)" of matching.py, which `--keep` finds again.
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matching
import numpy as np
import torch
from _harness import fill_sizes, parse_flags, write_results
from jaxtyping import Float
from matching import GALLERY, MatchingBench, Ranks, Rows, find, format_mean, rank_queries
from torch import Tensor
from torch.nn import functional

from cvmatch.data import images, schema, tables
from cvmatch.demo.procedural.aerial import TILE
from cvmatch.match.batches import decode_batch
from cvmatch.match.heads.branches import BranchHeads, fit_weights
from cvmatch.match.model import Matcher
from cvmatch.match.settings import BRANCHES_OF
from cvmatch.runtime import hardware, session
from cvmatch.segment.infer import SegmentAerial

CELLS = 8
"""Cells a side of the maps of classes that are compared."""

COLUMNS = [
    schema.PAIR_ID, schema.GROUND, schema.AERIAL, schema.CLASSES, schema.SYNTHETIC,
    schema.SYNTHETIC_CLASSES, schema.ERROR,
]  # fmt: skip

NOISE = ((2.0, 0.0), (5.0, 0.0), (10.0, 0.0), (0.0, 3.0))
"""Degrees (standard deviation) by which headings are wrong, and metres by which A is off."""

Cosines = dict[str, Float[Tensor, "query tile"]]


@dataclass(frozen=True)
class Held:
    """Held-out pairs of one seed, in the order of their ids."""

    queries: dict[str, Tensor]
    tiles: dict[str, Tensor]

    @property
    def cosines(self) -> Cosines:
        """Of each branch."""
        return {name: query @ self.tiles[name].T for name, query in self.queries.items()}


@torch.inference_mode()
def embed(rows: Rows, model: Matcher, degrees: float = 0.0, metres: float = 0.0) -> Held:
    """Embed the held-out pairs by each branch; S and the true class maps as further branches."""
    heads = model.heads
    assert isinstance(heads, BranchHeads)
    segment = SegmentAerial(f"{rows.at}/segmenter", source=schema.AERIAL, batch=32)
    draw = torch.Generator().manual_seed(rows.seed)
    parts: list[tuple[list[str], dict[str, Tensor], dict[str, Tensor]]] = []
    for table in tables.batches(f"{rows.synthesized}/val", COLUMNS):
        batch = {name: table[name].to_numpy() for name in COLUMNS}
        decoded = decode_batch(batch, model.config.panorama, model.config.tile_size)
        ground, aerial, synthetic = (
            torch.from_numpy(decoded[name]).float() / 255
            for name in ("ground", "aerial", "synthetic")
        )
        if degrees or metres:
            ground, synthetic = disturb(ground, synthetic, degrees, metres, draw)
        query = heads.query_parts(model.query_features(ground, synthetic))
        tile = heads.tile_parts(model.tile_features(aerial))
        query |= dict.fromkeys(("S", "S, true C"), share_classes(decoded["synthetic_mask"]))
        maps = segment(batch)[schema.SYNTHETIC_CLASSES]
        side = decoded["synthetic_mask"].shape[1:]
        tile["S"] = share_classes(np.stack([images.decode_ids(one, side) for one in maps]))
        tile["S, true C"] = share_classes(
            np.stack([images.classes_of(images.decode(one), 6) for one in batch[schema.CLASSES]])
        )
        parts.append((table[schema.PAIR_ID].to_pylist(), query, tile))
    return _join(parts)


def _join(parts: Sequence[tuple[list[str], dict[str, Tensor], dict[str, Tensor]]]) -> Held:
    ids = [pair_id for some, _, _ in parts for pair_id in some]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    sides = [query for _, query, _ in parts], [tile for _, _, tile in parts]
    return Held(*(_join_side(side, order) for side in sides))


def _join_side(parts: Sequence[dict[str, Tensor]], order: list[int]) -> dict[str, Tensor]:
    """Join vectors; those of maps are centred, so that their product is a correlation."""
    vectors = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
    maps = {name: one for name, one in vectors.items() if name.startswith("S")}
    return vectors | {
        name: functional.normalize(one - one.mean(0, keepdim=True), dim=1)
        for name, one in maps.items()
    }


def share_classes(ids: np.ndarray) -> Float[Tensor, "n c"]:
    """Return the share of each class in each cell of maps of ids."""
    planes = functional.one_hot(torch.from_numpy(ids).long().clamp(max=6), 7)[..., :6]
    return functional.adaptive_avg_pool2d(planes.permute(0, 3, 1, 2).float(), CELLS).flatten(1)


def disturb(
    ground: Float[Tensor, "n 3 h w"],
    synthetic: Float[Tensor, "n 3 s s"],
    degrees: float,
    metres: float,
    draw: torch.Generator,
) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 s s"]]:
    """Turn G and its A by a random angle, and move A in a random direction."""
    turn = torch.randn(len(ground), generator=draw) * degrees
    to = torch.rand(len(ground), generator=draw) * 2 * math.pi
    columns = (turn / 360 * ground.shape[-1]).round().int().tolist()
    turned = torch.stack([one.roll(by, -1) for one, by in zip(ground, columns, strict=True)])
    angle = turn.deg2rad()
    grid = torch.stack(
        [
            torch.stack([angle.cos(), -angle.sin(), to.cos() * 2 * metres / TILE], 1),
            torch.stack([angle.sin(), angle.cos(), to.sin() * 2 * metres / TILE], 1),
        ],
        1,
    )
    places = functional.affine_grid(grid, list(synthetic.shape), align_corners=False)
    moved = functional.grid_sample(
        synthetic, places, padding_mode="reflection", align_corners=False
    )
    return turned, moved


def add(cosines: Cosines, weights: Mapping[str, float]) -> Float[Tensor, "query tile"]:
    """Return the weighted sum of branches."""
    return torch.stack([weight * cosines[name] for name, weight in weights.items()]).sum(0)


def fit(cosines: Cosines, names: Sequence[str], gallery: int) -> dict[str, float]:
    """Fit the weights of branches on the pairs of one gallery, among the tiles of it."""
    part = slice(gallery * GALLERY, (gallery + 1) * GALLERY)
    # As branches of the modality that takes any: only their order counts.
    known = {str(one): name for one, name in zip(BRANCHES_OF["G+A"], names, strict=False)}
    found = fit_weights({branch: cosines[name][part, part] for branch, name in known.items()})
    return {known[branch]: weight for branch, weight in found.weights["G+A"].items()}


def rank_fitted(cosines: Cosines, names: Sequence[str]) -> Ranks:
    """Rank with weights that were fitted on another gallery than that of the query."""
    count = len(next(iter(cosines.values())))
    galleries = max(1, count // GALLERY)
    every = [
        rank_queries(add(cosines, fit(cosines, names, (one + 1) % galleries)))
        for one in range(galleries)
    ]
    part = torch.arange(count).clamp(max=galleries * GALLERY - 1) // GALLERY
    own = [torch.stack([getattr(one, kind) for one in every]) for kind in Ranks._fields]
    return Ranks(*(one[part, torch.arange(count)] for one in own))


def hits(ranks: Ranks) -> dict[str, Float[Tensor, " query"]]:
    """Return whether each query found its tile at once."""
    return {kind: (getattr(ranks, kind) == 0).float() for kind in Ranks._fields}


COMBINATIONS = (
    (("direct",), ()),
    (("layout",), ()),
    (("S",), ()),
    (("S, true C",), ()),
    (("direct", "layout"), ("direct",)),
    (("direct", "S"), ("direct",)),
    (("direct", "layout", "S"), ("direct", "layout")),
    (("direct", "layout", "S, true C"), ("direct", "layout")),
)
"""Branches that are added, and those that they are compared with."""


def measure(rows: Rows, model: Matcher) -> dict[str, tuple[dict, dict | None]]:
    """Return, by a name, the hits of each row of the table and of what it is compared with."""
    cosines = embed(rows, model).cosines
    found: dict[str, tuple[dict, dict | None]] = {}
    for names, without in COMBINATIONS:
        base = hits(rank_fitted(cosines, without)) if without else None
        found[" + ".join(names)] = hits(rank_fitted(cosines, names)), base
    alone = hits(rank_queries(cosines["direct"]))
    for weight in (0.1, 0.2, 0.3, 0.4, 0.5):
        score = add(cosines, {"direct": 1 - weight, "layout": weight})
        found[f"direct + layout, layout's weight {weight}"] = hits(rank_queries(score)), alone
    weights = fit(cosines, ("direct", "layout"), 0)
    for degrees, metres in NOISE:
        noisy = embed(rows, model, degrees, metres).cosines
        what = f"headings wrong by {degrees:g} degrees" if degrees else f"A off by {metres:g} m"
        found[f"direct + layout, {what}"] = (
            hits(rank_queries(add(noisy, weights))),
            hits(rank_queries(noisy["direct"])),
        )
    return found


def main(bench: MatchingBench) -> None:
    """Measure each seed, and pool the queries."""
    bench = fill_sizes(bench, matching.SIZES[bench.quick])
    session.start(logical_cpus=4)
    hardware.keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        seeds = []
        for seed in bench.seeds:
            rows = Rows(bench, matching.place_of(bench, at, seed), seed)
            if not os.path.exists(f"{rows.at}/{matching.DEFAULT}/matcher/config.json"):
                find(bench, rows, matching.DEFAULT)
            seeds.append(measure(rows, Matcher.load(f"{rows.at}/{matching.DEFAULT}/matcher")))
    table: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for name, (_, base) in seeds[0].items():
        row: dict[str, Any] = {"branches": name}
        for kind in Ranks._fields:
            mine = torch.cat([one[name][0][kind] for one in seeds])
            figures[f"{name}.{kind}"] = float(mine.mean())
            row[f"R@1 {kind}, %"] = format_mean(mine)
            if base is not None:
                other = torch.cat([(one[name][1] or {})[kind] for one in seeds])
                row[f"{kind}, gain"] = format_mean(mine - other)
            else:
                row[f"{kind}, gain"] = ""
        table.append(row)
    notes = (
        f"The matcher `{matching.DEFAULT}` of matching.py, {bench.pairs} training pairs, "
        f"{bench.held_out} held-out ones of other worlds, seeds {bench.seeds}; galleries of "
        f"{GALLERY}, and all joined. S: shares of the classes in {CELLS} x {CELLS} cells, of A as "
        "the toy segmenter sees it, against those of C by the same segmenter, or the true ones. "
        "Weights are fitted on the pairs of another gallery. The gain, paired, is over the same "
        "without the last branch; in the rows of weights and of noise, over direct alone in the "
        "same state. Noise is in the queries alone: normal, of this standard deviation, or an "
        "offset in a random direction.",
    )
    write_results(replace(bench, only=()), "Branches", table, figures, notes)


if __name__ == "__main__":
    main(parse_flags(MatchingBench))
