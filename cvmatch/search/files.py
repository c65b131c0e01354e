"""Panoramas + an index -> ranked tiles with scores and positions, in this process, without Ray.

The pictures go through the same actors as in the offline stages, so that decoding, resizing and
noise are the same; but one query must not wait for Ray to start.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from cvmatch.data import images, manifest, schema, storage
from cvmatch.data.geography import Area, Box, Circle
from cvmatch.generate.infer import GenerateAerial
from cvmatch.generate.settings import Sampling
from cvmatch.index.queries import SAMPLING
from cvmatch.index.ranking import rank
from cvmatch.index.reader import Index
from cvmatch.match.fusion import Query
from cvmatch.match.infer import EMBEDDING, QUERY_PROJ, EmbedQuery
from cvmatch.match.settings import Modality
from cvmatch.search.settings import SearchFiles
from cvmatch.segment.infer import SegmentAerial

_log = logging.getLogger(__name__)

_BATCH = 16  # panoramas a step
_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Answer:
    """What was found for one panorama."""

    query: str
    """Its location."""
    pictures: dict[str, bytes | None]
    """`ground`, and where they were made `synthetic` and `synthetic_classes`; encoded."""
    tiles: list[dict[str, Any]]
    """Best first: query, rank, tile, score, latitude, longitude, modality. JSON-able."""


def search_files(config: SearchFiles) -> Iterator[Answer]:
    """An answer for each panorama.

    Raises:
        ValueError: no panorama can be searched (a warning names some that cannot); a generator or
            segmenter that did not make the queries of the index; no tile in the area; or see
            `Index.open`.
    """
    places, pictures = _pictures(_places(config.panorama))
    index = Index.open(config.index)
    _check_models(config, index)
    inside = _inside(config, index)
    actors = _actors(config, index, len(pictures))
    return _search(config, places, pictures, index, inside, actors)


def query_of(batch: dict[str, np.ndarray], index: Index) -> Query:
    """What `EmbedQuery` gave for a batch, on the device of the index's model."""
    return Query(
        *(torch.from_numpy(batch[name]).to(index.device) for name in (EMBEDDING, QUERY_PROJ))
    )


def _search(
    config: SearchFiles,
    every: list[str],
    pictures: list[bytes],
    index: Index,
    inside: Int64[np.ndarray, " row"] | None,
    actors: list[Any],
) -> Iterator[Answer]:
    for begin in range(0, len(pictures), _BATCH):
        places = every[begin : begin + _BATCH]
        batch = _rows(places, pictures[begin : begin + _BATCH])
        for actor in actors[:-1]:
            batch = actor(batch)
        made = [_made(batch, row) for row in range(len(places))]
        batch = actors[-1](batch)  # drops the pictures
        failed = [error for error in schema.read_errors(batch[schema.ERROR]) if error is not None]
        if failed:
            raise ValueError(f"search: {len(failed)} panoramas failed: {'; '.join(failed)}")
        query = query_of(batch, index)
        ranked = rank(index, query, config.top_k, config.mode, config.shortlist, inside)
        for row, place in enumerate(places):
            found = _tiles(index, place, config.modality, ranked.rows[row], ranked.scores[row])
            yield Answer(place, made[row], list(found))


def _actors(config: SearchFiles, index: Index, rows: int) -> list[Any]:
    actors: list[Any] = []
    batch = min(rows, _BATCH)  # a network pads what it is given to its batch
    if config.generator:
        model = os.path.abspath(os.path.expanduser(config.generator))
        actors.append(GenerateAerial(model, _sampling(config, index), batch))
    if config.segmenter:
        actors.append(SegmentAerial(config.segmenter, batch=batch))
    return [*actors, EmbedQuery(index.heads, config.modality)]


def _sampling(config: SearchFiles, index: Index) -> Sampling:
    """As for the queries of the index, but for what is asked."""
    known, asked = index.manifest["queries"], vars(config)
    chosen = {name: known[name] for name in SAMPLING if name in known}
    chosen |= {name: asked[name] for name in SAMPLING if asked[name] is not None}
    return Sampling(**chosen, seed=config.seed)


def _check_models(config: SearchFiles, index: Index) -> None:
    """The matcher knows the aerials of one generator; those of another one are no A to it."""
    for name in ("generator", "segmenter"):
        wanted, given = index.manifest["queries"].get(name), getattr(config, name)
        if given and wanted and not config.any_models and manifest.fingerprint(given) != wanted:
            raise ValueError(
                f"search: expected the {name} that made this index's queries ({wanted}), got "
                f"{manifest.fingerprint(given)} (of {given}). Pass the other one, or "
                "--any-models True."
            )


def _inside(config: SearchFiles, index: Index) -> Int64[np.ndarray, " row"] | None:
    """Rows of the tiles that are searched; None: all."""
    if (area := _area(config)) is None:
        return None
    rows = index.inside(area)
    if not len(rows):
        known = len(index) - index.tiles[schema.LATITUDE].null_count
        raise ValueError(
            f"search: none of {len(index)} tiles lies in {area} ({known} have coordinates). "
            "Pass a larger area, or another index."
        )
    return rows


def _area(config: SearchFiles) -> Area | None:
    """Where the tile is looked for; None: everywhere."""
    if config.near:
        return Circle(*config.near)
    return Box(*config.box) if config.box else None


def _places(given: tuple[str, ...]) -> list[str]:
    """Locations of files; a directory stands for the pictures in it."""
    found = []
    for place in given:
        names = storage.names(place) if storage.is_directory(place) else []
        pictures = [name for name in names if name.lower().endswith(_PICTURES)]
        found += [storage.join(place, name) for name in pictures] or [place]
    return found


def _pictures(places: list[str]) -> tuple[list[str], list[bytes]]:
    """The files that hold a panorama, and their content; names the others in a warning."""
    found, good, bad = [], [], []
    for place in places:
        try:
            data = storage.read_bytes(place)
            images.open_panorama(data)
            found.append(data)
            good.append(place)
        except (OSError, images.BadImage) as error:
            bad.append(f"{place}: {error}")
    if not bad:
        return good, found
    text = f"search: {len(bad)} of {len(places)} panoramas cannot be searched.\n  "
    text += "\n  ".join(bad) + "\nMend these files, or leave them out."
    if not good:
        raise ValueError(text)
    _log.warning("%s The others are searched.", text)
    return good, found


def _rows(places: list[str], pictures: list[bytes]) -> dict[str, np.ndarray]:
    """A batch as `ingest` gives it. The file's stem is the id, which the generator's noise follows:
    a panorama of a data set gets the same synthetic aerial here as there."""
    batch = {
        schema.PAIR_ID: [os.path.splitext(os.path.basename(place))[0] for place in places],
        schema.GROUND: pictures,
        schema.ERROR: [None] * len(places),
    }
    return {name: _objects(values) for name, values in batch.items()}


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)  # numpy would strip zero bytes at the end of bytes
    array[:] = values
    return array


def _made(batch: dict[str, np.ndarray], row: int) -> dict[str, bytes | None]:
    names = (schema.GROUND, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES)
    return {name: batch[name][row] for name in names if name in batch}


def _tiles(
    index: Index, place: str, modality: Modality, rows: np.ndarray, scores: np.ndarray
) -> Iterator[dict[str, Any]]:
    tiles = index.about(rows[rows >= 0])
    for number, (tile, score) in enumerate(zip(tiles, scores, strict=False), 1):
        yield {
            "query": place,
            "rank": number,
            "tile": tile[schema.PAIR_ID],
            "score": float(score),
            "latitude": tile[schema.LATITUDE],
            "longitude": tile[schema.LONGITUDE],
            "modality": modality,
        }
