"""Panoramas + an index -> ranked tiles with scores and positions, in this process, without Ray.

The pictures go through the same actors as in the offline stages, so that decoding, resizing and
noise are the same; but one query must not wait for Ray to start.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Int64

from cvmatch.data import images, manifest, schema, storage
from cvmatch.data.geography import Area, Box, Circle
from cvmatch.generate.infer import GenerateAerial
from cvmatch.generate.sampling import Sampling
from cvmatch.index.queries import SAMPLING
from cvmatch.index.ranking import Mode, rank
from cvmatch.index.reader import Index
from cvmatch.match.fusion import Query
from cvmatch.match.infer import EMBEDDING, EmbedQuery, V
from cvmatch.match.settings import Level
from cvmatch.segment.infer import SegmentAerial

_log = logging.getLogger(__name__)

_BATCH = 16  # panoramas a step
_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class SearchFiles:
    """Find the tiles of panorama files."""

    panorama: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Location of a 360-degree panorama, north in the middle, or of a directory of them; repeat the
    flag for more."""
    index: str = "data/index"
    """Directory of the index, local or in an object store (then copied here first)."""
    top_k: int = 10
    """Tiles to give for each panorama."""
    generator: str = ""
    """Local directory of a generator, to search with the synthetic aerial too; empty: none."""
    segmenter: str = ""
    """Local directory of a segmenter, to search with its class map too; empty: none."""
    steps: int | None = None
    """Solver steps of the generator; None: as for the queries of the index."""
    guidance: float | None = None
    """Guidance scale of the generator; None: as for the queries of the index."""
    guided: float | None = None
    """Down to which share of the noise schedule guidance acts; None: as for these queries."""
    mode: Mode = "auto"
    """exact scores every tile, two-stage a shortlist; auto is exact up to 100,000 tiles."""
    shortlist: int = 0
    """Tiles that a two-stage search re-ranks; 0 takes the index's own number."""
    seed: int = 0
    """Of the generator's noise."""
    near: tuple[float, float, float] | None = None
    """Only tiles within a circle: latitude, longitude (degrees), metres."""
    box: tuple[float, float, float, float] | None = None
    """Only tiles in a box: south, west, north, east (degrees)."""
    any_models: bool = False
    """Search with another generator or segmenter than the one that made the index's queries."""
    page: str = ""
    """Also write an HTML page of what was found there."""
    tiles: str = ""
    """URI of rows (`pair_id`, `aerial`) with pictures of the tiles, for the page; empty: none."""
    open: bool = False
    """Open the page in a browser (without --page: search.html)."""

    def __post_init__(self) -> None:
        if not self.panorama or self.top_k < 1:
            raise ValueError(
                f"search: expected at least one --panorama FILE and top_k >= 1, got "
                f"{len(self.panorama)} and {self.top_k}."
            )
        if self.segmenter and not self.generator:
            raise ValueError(
                "search: --segmenter segments the synthetic aerial: give --generator too."
            )
        if self.near and self.box:
            raise ValueError("search: expected --near or --box, got both.")

    @property
    def level(self) -> Level:
        """What the queries consist of."""
        if not self.generator:
            return "G"
        return "G+A+S" if self.segmenter else "G+A"

    @property
    def area(self) -> Area | None:
        """Where the tile is looked for; None: everywhere."""
        if self.near:
            return Circle(*self.near)
        return Box(*self.box) if self.box else None


@dataclass(frozen=True)
class Answer:
    """What was found for one panorama."""

    query: str
    """Its location."""
    pictures: dict[str, bytes | None]
    """`ground`, and where they were made `synthetic` and `synthetic_classes`; encoded."""
    tiles: list[dict[str, Any]]
    """Best first: query, rank, tile, score, latitude, longitude, level. JSON-able."""


def search(config: SearchFiles) -> Iterator[Answer]:
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
    return Query(*(torch.from_numpy(batch[name]).to(index.device) for name in (EMBEDDING, V)))


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
            found = _tiles(index, place, config.level, ranked.rows[row], ranked.scores[row])
            yield Answer(place, made[row], list(found))


def _actors(config: SearchFiles, index: Index, rows: int) -> list[Any]:
    actors: list[Any] = []
    batch = min(rows, _BATCH)  # a network pads what it is given to its batch
    if config.generator:
        model = os.path.abspath(os.path.expanduser(config.generator))
        actors.append(GenerateAerial(model, _sampling(config, index), batch))
    if config.segmenter:
        actors.append(SegmentAerial(config.segmenter, batch=batch))
    return [*actors, EmbedQuery(index.heads, config.level)]


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
    if config.area is None:
        return None
    rows = index.inside(config.area)
    if not len(rows):
        known = len(index) - index.tiles[schema.LATITUDE].null_count
        raise ValueError(
            f"search: none of {len(index)} tiles lies in {config.area} ({known} have coordinates). "
            "Pass a larger area, or another index."
        )
    return rows


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
    index: Index, place: str, level: Level, rows: np.ndarray, scores: np.ndarray
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
            "level": level,
        }
