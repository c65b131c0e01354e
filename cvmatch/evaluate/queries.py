"""Synthesized rows -> embedded queries of every view and modality."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cvmatch.data import images, schema, tables
from cvmatch.evaluate.settings import Evaluate
from cvmatch.match.augment import crop_fov
from cvmatch.match.heads.branches import Features
from cvmatch.match.model import Matcher
from cvmatch.match.settings import Modality
from cvmatch.nn import geometry, rng
from cvmatch.runtime import progress

_BATCH = 32  # rows a step


@dataclass(frozen=True)
class QueryView:
    """How much of the panorama a query shows, and whether its heading is known."""

    fov: float
    """Degrees, (0, 360]."""
    unknown_heading: bool

    @property
    def name(self) -> str:
        """Such as "360-north"."""
        return f"{self.fov:g}-{'unknown' if self.unknown_heading else 'north'}"

    @property
    def whole(self) -> bool:
        """Whether it is the panorama that A and S were made from."""
        return self.fov == 360 and not self.unknown_heading


@torch.inference_mode()
def embed_queries(config: Evaluate, model: Matcher) -> dict[tuple[QueryView, Modality], Tensor]:
    """Embed the queries of all views and modalities; each tower sees each picture once.

    Limited views have modality G alone, since A and S were made from the whole, aligned panorama.
    Where headings are tried, a query of unknown heading has a vector of each (query x heading x
    width); see `draw_headings`.

    Raises:
        ValueError: a row lacks a picture that a modality needs.
    """
    headings = (False, True) if config.unknown_heading else (False,)
    views = [QueryView(degrees, unknown) for degrees in config.fov for unknown in headings]
    modalities: list[tuple[QueryView, Modality]] = [
        (view, name) for view in views for name in config.modalities if view.whole or name == "G"
    ]
    batches: dict[tuple[QueryView, Modality], list[Tensor]] = {key: [] for key in modalities}
    letters = set("".join(config.modalities)) - {"+"}
    total = -(-sum(tables.rows(config.queries)) // _BATCH)
    for rows in progress.each("embed batches of queries", total, read_batches(config.queries)):
        _require_pictures(rows, letters)
        ground = _stack_images(rows[schema.GROUND], model.config.panorama, model)
        features = _embed_synthetic(rows, letters, model)
        turn = draw_headings(rows[schema.PAIR_ID], config.seed)
        for view in views:
            heading = turn * view.unknown_heading
            seen = crop_fov(ground, view.fov, heading, model.ground_mean)
            if view.unknown_heading and config.headings > 1:
                if "G" in config.modalities:
                    batches[view, "G"].append(embed_headings(model, seen, config.headings))
                continue
            ground_features = model.ground_features(seen)
            for _, name in (key for key in modalities if key[0] == view):
                known = features.only(name)._replace(
                    ground=ground_features if "G" in name else None
                )
                batches[view, name].append(model.heads.embed_queries(known))
    return {key: torch.cat(parts) for key, parts in batches.items()}


def embed_headings(
    model: Matcher, ground: Float[Tensor, "query 3 h w"], count: int
) -> Float[Tensor, "query count width"]:
    """Embed panoramas as if they looked along each of `count` headings (`geometry.tried`)."""
    return torch.stack(
        [model.embed_queries(geometry.try_headings(one[None], count)[0]) for one in ground]
    )


def draw_headings(ids: Sequence[str], seed: int) -> Float[Tensor, " query"]:
    """Return the headings, in degrees, that queries of unknown heading look along."""
    keys = torch.tensor([rng.row_key(pair_id) for pair_id in ids])
    return rng.uniform(keys, rng.fold_in(seed, purpose="heading"), 1)[:, 0] * 360


def read_query_ids(location: str) -> list[str]:
    """Read the pair ids of the rows that did not fail."""
    batches = read_batches(location, [schema.PAIR_ID])
    return [pair_id for rows in batches for pair_id in rows[schema.PAIR_ID]]


def read_errors(location: str) -> list[str]:
    """Read why the first three rows failed."""
    for table in tables.batches(location, [schema.ERROR], 3):
        return table[schema.ERROR].to_pylist()
    return []


def read_batches(location: str, columns: Iterable[str] = ()) -> Iterator[dict[str, list]]:
    """Read columns (all by default) of the rows that did not fail, always in the same order."""
    names = [*(columns or schema.SYNTHESIZED.names)]
    for table in tables.batches(location, sorted({*names, schema.ERROR}), _BATCH):
        rows = schema.good_rows(table)
        if len(rows):
            yield rows.to_pydict()


def _embed_synthetic(rows: dict[str, list], letters: set[str], model: Matcher) -> Features:
    """Return the features of A and S, of those that a modality needs."""
    side = (model.config.tile_size, model.config.tile_size)
    synthetic = mask = None
    if "A" in letters:
        synthetic = _stack_images(rows[schema.SYNTHETIC], side, model)
    if "S" in letters:
        maps = [images.decode_ids(data, side) for data in rows[schema.SYNTHETIC_CLASSES]]
        mask = torch.from_numpy(np.stack(maps)).to(model.device)
    return model.query_features(None, synthetic, mask)


def _require_pictures(rows: dict[str, list], letters: set[str]) -> None:
    columns = schema.query_columns("+".join(sorted({"G", *letters})))
    lacking = sorted(name for name in columns if None in rows[name])
    if lacking:
        raise ValueError(
            f"evaluate: expected {lacking} in every row, got none in some rows of "
            f"{rows[schema.PAIR_ID]}. Run cvmatch synthesize on them, or pass --modalities G."
        )


def _stack_images(
    pictures: list[bytes], size: tuple[int, int], model: Matcher
) -> Float[Tensor, "n 3 h w"]:
    pixels = np.stack([images.decode(data, size, model.config.preprocess) for data in pictures])
    return torch.from_numpy(pixels).to(model.device).permute(0, 3, 1, 2).float() / 255
