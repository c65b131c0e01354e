"""Photos whose places are known, and imagery -> pairs to learn from: each photo with its tile.

The tile's middle is the photo's place. What is written is the layout `data.layouts.own_pairs`, with
photos as the panoramas that the models take. Squares of the ground are held out whole, and pairs
whose tile reaches into the other split's are left out, since they would be known by heart.
"""

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from cvmatch.data import images, manifest, storage
from cvmatch.data.layouts.csv_table import index_columns, read_csv
from cvmatch.data.layouts.own_pairs import parse_place
from cvmatch.data.layouts.rows import SPLITS, Position
from cvmatch.data.pairs import read_content
from cvmatch.data.photos.metadata import read_metadata
from cvmatch.data.photos.reading import read_photo
from cvmatch.data.settings import PhotoSettings
from cvmatch.gallery import resampling
from cvmatch.gallery.cutting import Cutter
from cvmatch.gallery.grid import Grid, square_at
from cvmatch.gallery.imagery.sources import detect_format
from cvmatch.gallery.settings import MakePairs
from cvmatch.runtime import lease, pools, progress, session

PHOTOS, TILES, REJECTED, BEGUN = "panoramas", "tiles", "rejected.jsonl", ".begun"
"""Names in the output; the last one holds what a killed run has done."""

LARGEST = PhotoSettings().max_pixels
"""Largest photo that is read, in pixels."""

STEP = 16
"""Photos of a task, which a run that goes on does again at most."""

NEEDED = ("photo", "latitude", "longitude")
"""Columns of the table of positions."""

ON_BORDER = "its tile reaches into the other split's part of the ground"

OUTSIDE = "the imagery shows {:.0%} of its tile"

COLUMNS: tuple[str, ...] = ("pair_id", "panorama", "tile", "latitude", "longitude", "heading")
"""Of the tables. Headings are 0, whatever metadata a panorama still has: north is in its middle."""


class Made(TypedDict):
    """What became of a photo."""

    pair_id: str
    panorama: str
    tile: str
    latitude: float | None
    longitude: float | None
    bytes: int
    """Of the photo's file, by which a changed one is noticed."""
    reason: str
    """Why it cannot be used; empty where it can."""
    shown: float
    """Share of its tile that the imagery shows, in [0, 1]."""


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

    The same command goes on where a killed one stopped, and makes the pairs again whose photos have
    changed or could not be used.

    Raises:
        ValueError: there is no photo, the table or the imagery cannot be used, the output holds
            something else or is being written, too many photos cannot be used, or no pair is left
            for a split.
    """
    output, imagery = (storage.absolute(one).rstrip("/") for one in (config.output, config.imagery))
    config = replace(config, output=output, photos=storage.absolute(config.photos).rstrip("/"))
    kind = detect_format(imagery) if config.format == "auto" else config.format
    cutter = Cutter(imagery, kind, Grid(config.metres, 0.0), config.size, config.zoom)
    if config.zoom is not None:
        cutter.source.find_zoom(config.zoom)
    photos = list_photos(config)
    steps = [
        Step(config, cutter, tuple(photos[at : at + STEP]), f"{output}/{BEGUN}/{at // STEP}.json")
        for at in range(0, len(photos), STEP)
    ]
    with lease.hold(output):
        _claim(config, cutter, photos)
        session.start()
        label = f"{len(photos)} photos, in steps of {STEP}"
        with progress.watch(label, len(steps), lambda: _count_steps(output)):
            made = [one for part in pools.map_tasks(make_step, steps) for one in part]
        return _write_tables(config, made)


def _count_steps(output: str) -> int:
    return len(storage.names(storage.join(output, BEGUN))) - 1  # one says what they are made from


def list_photos(config: MakePairs) -> list[Photo]:
    """List the photos of the table, else all below the directory.

    Raises:
        ValueError: there is none, two have one name, or the table lacks a column or holds a line
            that is no place.
    """
    if config.positions:
        photos = _read_positions(config.positions)
    else:
        # Names of cameras begin with _ where pictures are in Adobe RGB, as DCF has it.
        files = storage.list_files(config.photos, images.ENDINGS, hidden=(".",))
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
                f"{config.photos}: expected each photo once, and names that differ by more than "
                f"their ending (folders become part of a name: a/b is a-b), got {other} and "
                f"{one.file}. Rename one, or remove its line."
            )
        known[name_pair(one.file)] = one.file
    return photos


def name_pair(file: str) -> str:
    """Return the id of a photo's pair: its path without the ending."""
    stem, _ = posixpath.splitext(posixpath.normpath(file.replace("\\", "/")))
    return stem.replace("/", "-")


def make_step(step: Step) -> list[Made]:
    """Make the pairs of some photos, those that an earlier run did not make; a task."""
    known: dict[str, Made] = {}
    if storage.exists(step.record):
        known = {one["pair_id"]: one for one in storage.read_json(step.record)}
    made = []
    for photo in step.photos:
        before = known.get(name_pair(photo.file))
        kept = before is not None and not before["reason"] and not _has_changed(step, photo, before)
        made.append(before if before and kept else _make_pair(step.config, step.cutter, photo))
    storage.write_json(step.record, made)
    return made


def _has_changed(step: Step, photo: Photo, made: Made) -> bool:
    """Return whether a photo's file is there and of another size than when it was read."""
    filesystem, path = storage.resolve(storage.inside(step.config.photos, photo.file))
    (info,) = filesystem.get_file_info([path])
    return info.size is not None and info.size != made["bytes"]


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
    """Make the pair of a photo; what is wrong with the photo is its reason.

    What is wrong with the imagery is not: that ends the job.
    """
    pair_id = name_pair(photo.file)
    made: Made = {
        "pair_id": pair_id, "panorama": "", "tile": "", "latitude": None, "longitude": None,
        "bytes": 0, "reason": "", "shown": 0.0,
    }  # fmt: skip
    try:
        data = _read_file(config, photo)
        made["bytes"] = len(data)
        position = photo.position or read_metadata(images.read_header(data, LARGEST)).position
        if position is None:
            raise images.BadImage("its EXIF has no place: name it in a table (--positions)")
        band = read_photo(data, PhotoSettings(heading=photo.heading)).data
    except ValueError as error:
        return {**made, "reason": str(error)}
    made["latitude"], made["longitude"] = position
    try:
        tile, made["shown"] = cutter.cut_at(*position)
    except images.BadImage as error:
        return {**made, "reason": f"its tile: {error}"}
    if made["shown"] < config.min_coverage:
        return made
    # A band that is as it was keeps the form that it was stored in.
    ending = posixpath.splitext(photo.file)[1].lower() if band is data else ".png"
    made["panorama"], made["tile"] = f"{PHOTOS}/{pair_id}{ending}", f"{TILES}/{pair_id}.png"
    storage.write_bytes(storage.inside(config.output, made["panorama"]), band)
    storage.write_bytes(storage.inside(config.output, made["tile"]), images.encode(tile))
    return made


def _read_file(config: MakePairs, photo: Photo) -> bytes:
    """Read a photo's file.

    Raises:
        BadImage: it is not there, or cannot be read.
        ValueError: its name leaves the directory.
    """
    content, reason = read_content(*storage.resolve(storage.inside(config.photos, photo.file)))
    if content is None:
        raise images.BadImage(reason or "cannot be read")
    return content


def _read_positions(table: str) -> list[Photo]:
    lines = [(line, cells) for line, cells in read_csv(table, NEEDED) if any(cells)]
    places = index_columns(lines[0][1]) if lines else {}
    if missing := [name for name in NEEDED if name not in places]:
        raise ValueError(
            f"{table}: expected a first line that names the columns {list(NEEDED)} (and heading, "
            f"where known), got {list(places)}; {missing} lack."
        )
    photos = []
    for line, cells in lines[1:]:
        values = {name: cells[place] for name, place in places.items() if place < len(cells)}
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
    if not storage.exists(state):
        tables = {f"{split}.csv" for split in SPLITS}.intersection(storage.names(config.output))
        if tables:
            raise ValueError(
                f"{config.output}: expected no tables that cvmatch pairs has not written, got "
                f"{sorted(tables)}, which it would replace. Pass another --output."
            )
    elif storage.read_json(state) != made_from:
        raise ValueError(
            f"{config.output}: expected pairs made from these photos, this imagery and these "
            "settings, got others. Remove it, or pass another --output."
        )
    storage.write_json(state, made_from)


def _write_tables(config: MakePairs, made: Sequence[Made]) -> dict[str, int]:
    """Divide the pairs, and write the tables: both or none."""
    unusable = [(one["pair_id"], one["reason"]) for one in made if one["reason"]]
    placed = [one for one in made if not one["reason"]]
    outside = [
        (one["pair_id"], OUTSIDE.format(one["shown"]))
        for one in placed
        if one["shown"] < config.min_coverage
    ]
    splits = _divide(config, [one for one in placed if one["shown"] >= config.min_coverage])
    border = [(one["pair_id"], ON_BORDER) for one in splits.pop(ON_BORDER)]
    left_out = [*unusable, *outside, *border]
    lines = [json.dumps({"pair_id": name, "reason": why}) + "\n" for name, why in left_out]
    storage.write_text(storage.join(config.output, REJECTED), "".join(lines))
    _check_counts(config, len(made), unusable, splits, left_out)
    for split in reversed(SPLITS):  # a kill between them leaves no table of another division
        storage.remove(storage.join(config.output, f"{split}.csv"))
    for split, rows in splits.items():
        if rows:
            _write_table(storage.join(config.output, f"{split}.csv"), rows)
    return {split: len(rows) for split, rows in splits.items()} | {
        "on_border": len(border), "outside": len(outside), "unusable": len(unusable),
    }  # fmt: skip


def _divide(config: MakePairs, made: Sequence[Made]) -> dict[str, list[Made]]:
    splits: dict[str, list[Made]] = {split: [] for split in (*SPLITS, ON_BORDER)}
    for one in made:
        assert one["latitude"] is not None
        assert one["longitude"] is not None
        place = one["latitude"], one["longitude"]
        splits[choose_split(config, place) or ON_BORDER].append(one)
    return splits


def _check_counts(
    config: MakePairs,
    count: int,
    unusable: Sequence[tuple[str, str]],
    splits: Mapping[str, Sequence[Made]],
    left_out: Sequence[tuple[str, str]],
) -> None:
    examples = "; ".join(f"{name}: {why}" for name, why in (unusable or left_out)[:3])
    if len(unusable) > config.max_rejected * count:
        raise ValueError(
            f"{config.output}: {len(unusable)} of {count} photos cannot be used, at most "
            f"{config.max_rejected:.0%} may (--max-rejected): {examples}. All are in {REJECTED}; "
            "mend them, and the same command looks at them again."
        )
    for split, rows in splits.items():
        if not rows and (split == "train" or config.val_share):
            raise ValueError(
                f"{config.output}: expected pairs of {split}, got none of {count} photos "
                f"({len(left_out)} are left out{f', such as {examples}' if examples else ''}). "
                "Smaller squares (--block-metres), another --val-share or another --seed divide "
                "the ground in another way; nothing is cut again for it."
            )


def _write_table(location: str, rows: Sequence[Made]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows({**row, "heading": 0} for row in rows)
    storage.write_text(location, text.getvalue())
