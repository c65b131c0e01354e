"""Panoramas + an index -> ranked tiles with scores and positions, in this process, without Ray.

Each picture becomes the panorama that the models were trained on (`cvmatch.data.photos`), and goes
through the same actors as in the offline stages, so that decoding, resizing and noise are the same;
but one query must not wait for Ray to start.
"""

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Int64

from cvmatch.data import images, manifest, schema, storage
from cvmatch.data.geography import Area, Box, Circle
from cvmatch.data.photos.reading import PhotoReading, read_photo
from cvmatch.data.schema import QUERY_VECTOR
from cvmatch.data.settings import PhotoSettings
from cvmatch.generate.settings import Sampling
from cvmatch.index.manifest import SAMPLING
from cvmatch.index.reader import Index, rank, rank_best
from cvmatch.match.infer import EmbedQuery
from cvmatch.nn import calibration, geometry
from cvmatch.nn.batch_invariant import call_rows, error_line
from cvmatch.nn.calibration import Calibration
from cvmatch.search.settings import SearchFiles

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

HEADINGS = 32
"""Headings that are tried for a photo of which nothing says where it looks: 11 degrees apart."""

_BATCH = 16  # panoramas a step


class RankedTile(TypedDict):
    """A tile of a search, as a line of JSON."""

    query: str
    """Location of the panorama."""
    rank: int
    """1 is the best."""
    tile: str
    """pair_id."""
    score: float
    probability: float | None
    """That this is the place, in [0, 1]; None: the index was built without enough queries of its
    own tiles."""
    branches: dict[str, float]
    """What each branch adds to the score; empty for a joint score."""
    latitude: float | None
    """Degrees, like the longitude; None: not known."""
    longitude: float | None
    modality: str
    """What the query consisted of."""
    heading: float | None
    """Where the panorama's middle looks, in degrees clockwise from north: as is known of it, or
    where headings were tried, as it fits this tile best. None: north was assumed."""
    read: str
    """What was read of the panorama's file, and assumed; in one line."""


def read_coordinates(tile: RankedTile) -> tuple[float, float] | None:
    """Return degrees north and east of a tile; None: not known."""
    latitude, longitude = tile["latitude"], tile["longitude"]
    return None if latitude is None or longitude is None else (latitude, longitude)


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one panorama."""

    query: str
    """Its location."""
    pictures: dict[str, bytes | None] = field(default_factory=dict)
    """`ground`, and where they were made `synthetic` and `synthetic_classes`; encoded."""
    tiles: list[RankedTile] = field(default_factory=list)
    """Best first; none where there is an `error`."""
    absent: float | None = None
    """Probability that the index does not hold the place, in [0, 1]; None: as for the tiles."""
    error: str | None = None
    """Why the panorama could not be searched."""
    read: PhotoReading | None = None
    """What was read of its file, and assumed; None: it could not be read."""


@dataclass(frozen=True)
class _Panorama:
    """A file that may hold a panorama."""

    location: str
    data: bytes = b""
    """The panorama as the models take it, encoded."""
    error: str | None = None
    read: PhotoReading | None = None


@dataclass(frozen=True)
class _Query:
    """A panorama's pictures and vector, or why it has none."""

    pictures: dict[str, bytes | None] = field(default_factory=dict)
    vectors: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """One; or where headings are tried, one for each of them."""
    error: str | None = None


@dataclass(frozen=True)
class _Ranked:
    """Tiles of a query, best first."""

    rows: Int64[np.ndarray, " tile"]
    scores: np.ndarray
    vectors: np.ndarray
    """The query's, for each tile."""
    headings: list[float | None]
    """With which each was found; None: nothing was tried."""


def search_files(config: SearchFiles) -> Iterator[SearchResult]:
    """Return a result for each panorama; a warning names those that cannot be searched.

    Raises:
        ValueError: no panorama can be searched; a generator or segmenter that did not make the
            queries of the index; no tile in the area; or see `Index.open`.
    """
    locations = _list_locations(config.panorama)
    panoramas = [_read_panorama(location, config) for location in locations]
    _log_readings(panoramas)
    _warn_failed({one.location: one.error for one in panoramas if one.error}, len(panoramas))
    index = Index.open(config.index)
    _check_models(config, index)
    rows = _select_rows(config, index)
    readable = sum(one.error is None for one in panoramas)
    actors = _load_actors(config, index, min(readable, _BATCH))  # a network pads to its batch
    return _search(config, panoramas, index, rows, actors)


def _search(
    config: SearchFiles,
    panoramas: Sequence[_Panorama],
    index: Index,
    rows: Int64[np.ndarray, " row"] | None,
    actors: Sequence[Any],
) -> Iterator[SearchResult]:
    known = {one.location: one.error for one in panoramas if one.error}
    failed: dict[str, str] = {}
    for begin in range(0, len(panoramas), _BATCH):
        step = panoramas[begin : begin + _BATCH]
        for result in _search_batch(config, step, index, rows, actors):
            if result.error and result.query not in known:
                failed[result.query] = result.error
            yield result
    _warn_failed(failed, len(panoramas) - len(known))


def _search_batch(
    config: SearchFiles,
    panoramas: Sequence[_Panorama],
    index: Index,
    rows: Int64[np.ndarray, " row"] | None,
    actors: Sequence[Any],
) -> Iterator[SearchResult]:
    counts = [_count_headings(config, panorama) for panorama in panoramas]
    embed = functools.partial(_embed, actors=actors)
    results = call_rows(embed, list(zip(panoramas, counts, strict=True)))
    queries = [
        _Query(error=error_line(result)) if isinstance(result, Exception) else result
        for result in results
    ]
    answers = _rank(config, [query.vectors for query in queries if not query.error], index, rows)
    fitted = index.calibration_of(config.modality)
    for panorama, query, count in zip(panoramas, queries, counts, strict=True):
        if query.error is not None:
            yield SearchResult(panorama.location, error=query.error, read=panorama.read)
            continue
        found = next(answers)
        # A best of several is higher than the scores that probabilities were fitted on.
        chances, absent = _find_chances(fitted if count == 1 else None, found.scores)
        read = _set_heading(panorama.read, found)
        tiles = _describe_tiles(config, index, panorama.location, read, found, chances)
        yield SearchResult(panorama.location, query.pictures, tiles, absent=absent, read=read)


def _count_headings(config: SearchFiles, panorama: _Panorama) -> int:
    """Return how many headings are tried for a panorama."""
    read = panorama.read
    if read is None or read.heading_source != "assumed" or config.generator:
        return 1
    return config.headings or (1 if read.projection == "band" else HEADINGS)


def _rank(
    config: SearchFiles,
    queries: Sequence[np.ndarray],
    index: Index,
    rows: Int64[np.ndarray, " row"] | None,
) -> Iterator[_Ranked]:
    """Rank the tiles of queries, those of one vector together."""
    count = max(config.top_k, calibration.TOP)  # all that take part in a probability
    vectors = [torch.from_numpy(query).to(index.device) for query in queries]
    single = [one for one in vectors if len(one) == 1]
    answers = iter(())
    if single:
        ranking = rank(index, torch.cat(single), count, config.mode, config.shortlist, rows)
        answers = zip(ranking.rows, ranking.scores, strict=True)
    for query, tensor in zip(queries, vectors, strict=True):
        if len(query) == 1:
            found, scores = next(answers)
            yield _Ranked(found, scores, query.repeat(len(found), 0), [None] * len(found))
            continue
        best, turns = rank_best(index, tensor, count, config.mode, config.shortlist, rows)
        tried = geometry.tried(len(query))
        headings: list[float | None] = [tried[turn] for turn in turns[0]]
        yield _Ranked(best.rows[0], best.scores[0], query[turns[0]], headings)


def _set_heading(read: PhotoReading | None, found: _Ranked) -> PhotoReading | None:
    """Note the heading with which the best tile was found, where headings were tried."""
    if read is None or not len(found.rows) or found.headings[0] is None:
        return read
    return replace(read, heading=found.headings[0], heading_source="search")


def _find_chances(
    fitted: Calibration | None, scores: np.ndarray
) -> tuple[list[float | None], float | None]:
    """Return the probabilities of tiles, best first, and that the place is not in the index."""
    if fitted is None:
        return [None] * len(scores), None
    known = scores[None].astype(np.float64)
    return fitted.probabilities(known)[0].tolist(), 1 - float(fitted.present(known)[0])


def _embed(rows: Sequence[tuple[_Panorama, int]], actors: Sequence[Any]) -> list[_Query]:
    """Run the actors on panoramas, for each of which so many headings are tried."""
    *makers, embed = actors
    panoramas = [panorama for panorama, _ in rows]
    batch = _make_batch(panoramas)
    for actor in makers:
        batch = actor(batch)
    names = (schema.GROUND, schema.SYNTHETIC, schema.SYNTHETIC_CLASSES)
    columns = [name for name in names if name in batch]
    embedded = embed(batch)  # which drops the pictures
    errors = schema.read_errors(embedded[schema.ERROR])
    return [
        _Query(
            {name: batch[name][row] for name in columns},
            embedded[QUERY_VECTOR][row][None]
            if count == 1 or errors[row]
            else embed.try_headings(panorama.data, count),
            errors[row],
        )
        for row, (panorama, count) in enumerate(rows)
    ]


def _load_actors(config: SearchFiles, index: Index, batch: int) -> list[Any]:
    actors: list[Any] = []
    if config.generator:
        from cvmatch.generate.infer import GenerateAerial  # noqa: PLC0415 (10 s of a core)

        model = storage.absolute(config.generator)
        actors.append(GenerateAerial(model, _choose_sampling(config, index), batch))
    if config.segmenter:
        from cvmatch.segment.infer import SegmentAerial  # noqa: PLC0415 (as above)

        actors.append(SegmentAerial(config.segmenter, batch=batch))
    return [*actors, EmbedQuery(index.matcher_dir, config.modality)]


def _choose_sampling(config: SearchFiles, index: Index) -> Sampling:
    """Sample as for the queries of the index, but for what is set."""
    known, settings = index.manifest.queries.sampling, vars(config)
    chosen = {name: known[name] for name in SAMPLING if name in known}
    chosen |= {name: settings[name] for name in SAMPLING if settings[name] is not None}
    return replace(Sampling(seed=config.seed), **chosen)


def _check_models(config: SearchFiles, index: Index) -> None:
    """Check that A and S are of the models whose A and S the matcher knows."""
    origin = index.manifest.queries
    expected = {"generator": origin.generator, "segmenter": origin.segmenter}
    for name, fingerprint in expected.items():
        directory = getattr(config, name)
        if not directory or not fingerprint or config.any_models:
            continue
        if (got := manifest.fingerprint(directory)) != fingerprint:
            raise ValueError(
                f"search: expected the {name} that made this index's queries ({fingerprint}), got "
                f"{got} (of {directory}). Pass the other one, or --any-models."
            )


def _select_rows(config: SearchFiles, index: Index) -> Int64[np.ndarray, " row"] | None:
    """Return the rows of the tiles that are searched; None: all."""
    if (area := _area(config)) is None:
        return None
    rows = index.rows_inside(area)
    if not len(rows):
        known = len(index) - index.tiles[schema.LATITUDE].null_count
        raise ValueError(
            f"search: none of {len(index)} tiles lies in {area} ({known} have coordinates). "
            "Pass a larger area, or another index."
        )
    return rows


def _area(config: SearchFiles) -> Area | None:
    if config.near:
        return Circle(*config.near)
    return Box(*config.box) if config.box else None


def _list_locations(panoramas: Sequence[str]) -> list[str]:
    """Return locations of files; a directory stands for the pictures in it.

    What else is in a directory is named in a warning, but for hidden files.

    Raises:
        ValueError: there are only directories, without a picture.
    """
    locations, left_out = [], []
    for location in panoramas:
        if not storage.is_directory(location):
            locations.append(location)
            continue
        names = [name for name in storage.names(location) if not name.startswith(".")]
        pictures = [name for name in names if images.is_picture(name)]
        locations += [storage.join(location, name) for name in pictures]
        if others := [name for name in names if name not in pictures]:
            left_out.append(f"{location} holds {len(others)} others: {', '.join(others[:8])}")
        elif not pictures:
            left_out.append(f"{location} is empty")
    text = (
        f"search: of a directory, its {', '.join(images.ENDINGS)} files are searched; "
        f"{'; '.join(left_out)}. Convert other pictures to JPEG, and pass folders by themselves."
    )
    if not locations:
        raise ValueError(text)
    if left_out:
        _log.warning(text)
    return locations


def _read_panorama(location: str, settings: PhotoSettings) -> _Panorama:
    try:
        photo = read_photo(storage.read_bytes(location), settings)
    except (OSError, images.BadImage) as error:
        return _Panorama(location, error=str(error))
    return _Panorama(location, photo.data, read=photo.read)


def _log_readings(panoramas: Sequence[_Panorama]) -> None:
    """Say of each panorama what was read; what may make its result wrong is a warning."""
    for panorama in panoramas:
        if panorama.read is not None:
            level = logging.WARNING if panorama.read.warnings else logging.INFO
            _log.log(level, "search: %s: %s", panorama.location, panorama.read)


def _warn_failed(errors: Mapping[str, str], total: int) -> None:
    """Name panoramas that cannot be searched in a warning; in an error where they are all."""
    if not errors:
        return
    lines = "\n  ".join(f"{location}: {error}" for location, error in errors.items())
    text = f"search: {len(errors)} of {total} panoramas cannot be searched.\n  {lines}"
    text += "\nMend these files, or leave them out."
    if len(errors) == total:
        raise ValueError(text)
    _log.warning("%s The others are searched.", text)


def _make_batch(panoramas: Sequence[_Panorama]) -> Batch:
    """Make a batch of rows. The file's stem is the id, which the generator's noise
    follows: a panorama of a data set gets the same synthetic aerial here as there."""
    stems = [os.path.splitext(os.path.basename(one.location))[0] for one in panoramas]
    columns = {
        schema.PAIR_ID: stems,
        schema.GROUND: [one.data or None for one in panoramas],
        schema.ERROR: [one.error for one in panoramas],
    }
    return {name: schema.object_array(values) for name, values in columns.items()}


def _describe_tiles(
    config: SearchFiles,
    index: Index,
    location: str,
    read: PhotoReading | None,
    found: _Ranked,
    chances: Sequence[float | None],
) -> list[RankedTile]:
    known = int((found.rows[: config.top_k] >= 0).sum())
    rows, vectors = found.rows[:known], torch.from_numpy(found.vectors[:known]).to(index.device)
    parts = [
        part
        for row, vector in zip(rows, vectors, strict=True)
        for part in index.split_scores(vector, row[None])
    ]
    stated = read.heading if read and read.heading_source != "assumed" else None
    return [
        RankedTile(
            query=location,
            rank=number + 1,
            tile=tile["pair_id"],
            score=float(found.scores[number]),
            probability=chances[number],
            branches=parts[number],
            latitude=tile["latitude"],
            longitude=tile["longitude"],
            modality=config.modality,
            heading=stated if found.headings[number] is None else found.headings[number],
            read=str(read),
        )
        for number, tile in enumerate(index.describe(rows))
    ]
