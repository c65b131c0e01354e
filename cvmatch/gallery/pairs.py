"""Photos whose places are known, and imagery -> pairs to learn from: each photo with its tile.

The tile's middle is the photo's place. What is written is the layout `data.layouts.own_pairs`, with
photos as the panoramas that the models take. Squares of the ground are held out whole, and pairs
whose tile reaches into the other split's are left out, since they would be known by heart.
"""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from cvmatch.data import images, manifest, storage
from cvmatch.data.layouts.csv_table import read_csv
from cvmatch.data.layouts.own_pairs import parse_place
from cvmatch.data.layouts.rows import Position
from cvmatch.data.photos.metadata import read_metadata
from cvmatch.data.photos.reading import read_photo
from cvmatch.data.settings import PhotoSettings
from cvmatch.gallery import resampling
from cvmatch.gallery.cutting import Cutter
from cvmatch.gallery.grid import Grid, square_at
from cvmatch.gallery.imagery.sources import detect_format
from cvmatch.gallery.settings import MakeGallery, MakePairs
from cvmatch.runtime import pools, session

PHOTOS, TILES, REJECTED, BEGUN = "panoramas", "tiles", "rejected.jsonl", ".begun"
"""Names in the output; the last one holds what a killed run has done."""

LARGEST = PhotoSettings().max_pixels
"""Largest photo that is read, in pixels."""

STEP = 16
"""Photos of a task, which a run that goes on does again at most."""

NEEDED = ("photo", "latitude", "longitude")
"""Columns of the table of positions."""

ON_BORDER = "its tile reaches into the other split's part of the ground"

COLUMNS: tuple[str, ...] = ("pair_id", "panorama", "tile", "latitude", "longitude")
"""Of the tables."""


class Made(TypedDict):
    """What became of a photo."""

    pair_id: str
    panorama: str
    tile: str
    latitude: float | None
    longitude: float | None
    reason: str
    """Why there is none; empty where there is."""


@dataclass(frozen=True)
class Photo:
    """A photo to make a pair of."""

    file: str
    """Below the directory of the photos."""
    position: Position | None = None
    """Where the table says that it was taken; None: as its EXIF says."""
    heading: float | None = None
    """As the table says; None: as it says itself, else north."""


@dataclass(frozen=True)
class Step:
    """Photos of one task."""

    config: MakePairs
    cutter: Cutter
    photos: tuple[Photo, ...]
    record: str
    """Location of what became of them, written last."""


def make_pairs(config: MakePairs) -> dict[str, int]:
    """Write pairs as train.csv and val.csv; return how many there are, and how many are left out.

    The same command goes on where a killed one stopped.

    Raises:
        ValueError: there is no photo, the table or the imagery cannot be used, the output holds
            pairs made from something else, or no pair is left for a split.
    """
    output, imagery = (storage.absolute(one).rstrip("/") for one in (config.output, config.imagery))
    config = replace(config, output=output, photos=storage.absolute(config.photos).rstrip("/"))
    kind = detect_format(imagery) if config.format == "auto" else config.format
    cells = MakeGallery(metres=config.metres, overlap=0.0, size=config.size, zoom=config.zoom)
    cutter = Cutter.of(cells, kind, imagery)
    photos = list_photos(config)
    _claim(config, cutter, photos)
    steps = [
        Step(config, cutter, tuple(photos[at : at + STEP]), f"{output}/{BEGUN}/{at // STEP}.json")
        for at in range(0, len(photos), STEP)
    ]
    session.start()
    made = [one for part in pools.map_tasks(make_step, steps) for one in part]
    return _write_tables(config, made)


def list_photos(config: MakePairs) -> list[Photo]:
    """List the photos of the table, else all below the directory.

    Raises:
        ValueError: there is none, or the table lacks a column or holds a line that is no place.
    """
    if config.positions:
        photos = _read_positions(config.positions)
    else:
        files = storage.list_files(config.photos, images.ENDINGS)
        photos = [Photo(file) for file in files]
    if not photos:
        raise ValueError(
            f"{config.positions or config.photos}: expected photos ({', '.join(images.ENDINGS)}), "
            "got none."
        )
    known: dict[str, str] = {}
    for one in photos:
        if other := known.get(name_pair(one.file)):
            raise ValueError(
                f"{config.photos}: expected names that differ by more than their ending, and each "
                f"photo once, got {other} and {one.file}. Rename one, or remove its line."
            )
        known[name_pair(one.file)] = one.file
    return photos


def name_pair(file: str) -> str:
    """Return the id of a photo's pair: its path without the ending."""
    return file.rpartition(".")[0].replace("/", "-")


def make_step(step: Step) -> list[Made]:
    """Make the pairs of some photos, or read what an earlier run made; a task."""
    if storage.exists(step.record):
        return storage.read_json(step.record)
    made = [_make_pair(step.config, step.cutter, photo) for photo in step.photos]
    storage.write_json(step.record, made)
    return made


def choose_split(config: MakePairs, position: Position) -> str:
    """Return the split of a place: train or val by the square it lies in; empty: near the border.

    A square is of one split whole, chosen by a hash of its place in the grid and the seed.
    """
    latitude, longitude = position
    west, south, east, north = square_at(latitude, longitude, config.metres).tolist()
    places = [position, (south, west), (south, east), (north, west), (north, east)]
    splits = {_split_of_square(config, place) for place in places}
    return splits.pop() if len(splits) == 1 else ""


def _split_of_square(config: MakePairs, position: Position) -> str:
    square = Grid(config.block_metres, 0.0).cell_at(*position)
    text = f"{config.seed} {square.row[0]} {square.column[0]}"
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    return "val" if draw < config.val_share else "train"


def _make_pair(config: MakePairs, cutter: Cutter, photo: Photo) -> Made:
    pair_id = name_pair(photo.file)
    made: Made = {
        "pair_id": pair_id, "panorama": "", "tile": "", "latitude": None, "longitude": None,
        "reason": "",
    }  # fmt: skip
    try:
        data = storage.read_bytes(storage.inside(config.photos, photo.file))
        position = photo.position or read_metadata(images.read_header(data, LARGEST)).position
        if position is None:
            raise images.BadImage("its EXIF has no place: name it in a table (--positions)")
        made["latitude"], made["longitude"] = position
        band = read_photo(data, PhotoSettings(heading=photo.heading)).data
        tile, shown = cutter.cut_at(*position)
        if shown < config.min_coverage:
            raise images.BadImage(f"the imagery shows {shown:.0%} of its tile")
    except FileNotFoundError:
        return {**made, "reason": "no such file"}
    except (images.BadImage, ValueError) as error:
        return {**made, "reason": str(error)}
    ending = "jpg" if band[:2] == b"\xff\xd8" else "png"
    made["panorama"] = f"{PHOTOS}/{pair_id}.{ending}"
    made["tile"] = f"{TILES}/{pair_id}.png"
    storage.write_bytes(storage.join(config.output, made["panorama"]), band)
    storage.write_bytes(storage.join(config.output, made["tile"]), images.encode(tile))
    return made


def _read_positions(table: str) -> list[Photo]:
    lines = [(line, cells) for line, cells in read_csv(table, NEEDED) if any(cells)]
    first = [cell.lower() for cell in lines[0][1]] if lines else []
    if missing := [name for name in NEEDED if name not in first]:
        raise ValueError(
            f"{table}: expected a first line that names the columns {list(NEEDED)} (and heading, "
            f"where known), got {first}; {missing} lack."
        )
    photos = []
    for line, cells in lines[1:]:
        values = dict(zip(first, cells, strict=False))
        try:
            position, heading = parse_place(values)
        except ValueError as error:
            raise ValueError(f"{table} line {line}: {error}") from None
        photos.append(Photo(values.get("photo", ""), position, heading))
    return photos


def _claim(config: MakePairs, cutter: Cutter, photos: Sequence[Photo]) -> None:
    """Note what the pairs are made from, or check that they were made from the same."""
    made_from = manifest.digest(
        [
            cutter.source.fingerprint(), config.photos, config.metres, config.size, config.zoom,
            config.min_coverage,
            [[one.file, one.position, one.heading] for one in photos], resampling.VERSION,
            images.PREPROCESS,
        ]
    )  # fmt: skip
    state = storage.join(config.output, BEGUN, "made_from.json")
    before = storage.read_json(state) if storage.exists(state) else made_from
    if before != made_from:
        raise ValueError(
            f"{config.output}: expected pairs made from these photos, this imagery and these "
            "settings, got others. Remove it, or pass another --output."
        )
    storage.write_json(state, made_from)


def _write_tables(config: MakePairs, made: Sequence[Made]) -> dict[str, int]:
    splits: dict[str, list[Made]] = {"train": [], "val": [], ON_BORDER: []}
    for one in made:
        if one["latitude"] is not None and one["longitude"] is not None and not one["reason"]:
            place = one["latitude"], one["longitude"]
            splits[choose_split(config, place) or ON_BORDER].append(one)
    border = splits.pop(ON_BORDER)
    left_out = [(one["pair_id"], one["reason"]) for one in made if one["reason"]]
    left_out += [(one["pair_id"], ON_BORDER) for one in border]
    lines = [json.dumps({"pair_id": name, "reason": why}) + "\n" for name, why in left_out]
    storage.write_text(storage.join(config.output, REJECTED), "".join(lines))
    for split, rows in splits.items():
        if not rows and (split == "train" or config.val_share):
            examples = "; ".join(f"{name}: {why}" for name, why in left_out[:3])
            raise ValueError(
                f"{config.output}: expected pairs of {split}, got none of {len(made)} photos "
                f"({len(left_out)} are left out{f', such as {examples}' if examples else ''}). "
                "Smaller squares (--block-metres), another --val-share or another --seed divide "
                "the ground in another way; nothing is cut again for it."
            )
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        storage.write_text(storage.join(config.output, f"{split}.csv"), text.getvalue())
    unusable = len(left_out) - len(border)
    return {split: len(rows) for split, rows in splits.items()} | {
        "on_border": len(border), "unusable": unusable,
    }  # fmt: skip
