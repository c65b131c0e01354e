"""One panorama in many files: which are read like the plain one, which refused, which named."""

import functools
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from _harness import Bench, fill_sizes, parse_flags, write_results
from jaxtyping import Float, UInt8
from matching import ALONE, MatchingBench, make_config
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from cvmatch.data import images, schema
from cvmatch.data.photos.metadata import NAMESPACE
from cvmatch.data.photos.reading import read_photo
from cvmatch.data.schema import QUERY_VECTOR, TILE_VECTOR
from cvmatch.data.settings import PhotoSettings
from cvmatch.demo.procedural.aerial import render_aerial
from cvmatch.demo.procedural.pairs import Pair, Sizes, render_pairs, world_seed
from cvmatch.demo.procedural.panorama import render_panorama
from cvmatch.demo.procedural.world import build_world, place_cameras
from cvmatch.match.infer import EmbedQuery, EmbedTile
from cvmatch.match.train import build_task
from cvmatch.nn import rng
from cvmatch.runtime import hardware, progress

SIZES = {
    True: {"pairs": 160, "epochs": 4, "places": 16},
    False: {"pairs": 800, "epochs": 12, "places": 96},
}
"""Of a quick run, and of another."""

WIDTH, HEIGHT, HIGH = 704, 352, 128
"""Columns and rows of a sphere, and rows of the band in its middle."""

TOP = (HEIGHT - HIGH) // 2
FIRST_WORLD = 10**6
"""Number of the first world of the queries, of which no training has any."""

PER_WORLD = 16
POINT = 0.01

Expected = Literal["as plain", "refused", "named", "not knowable"]
Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True, kw_only=True)
class InputsBench(Bench):
    """Train a small matcher, and search with the same panoramas in many files."""

    pairs: int = 0
    """Training pairs; 0: 800, quick 160."""
    epochs: int = 0
    """Epochs of the matcher; 0: 12, quick 4."""
    places: int = 0
    """Panoramas, each of which ranks the tiles of all; 0: 96, quick 16."""
    keep: str = ""
    """Directory of the matcher, which a later run uses again; empty: it is deleted."""
    only: tuple[str, ...] = ()
    """Rows of the table (words of their names); empty: all."""
    seed: int = 0
    """Of the worlds and the training."""


@dataclass(frozen=True)
class Place:
    """A held-out place: its tile, and its panorama as a band and as the whole sphere around it."""

    tile: bytes
    band: Pixels
    sphere: Pixels


@dataclass(frozen=True)
class Way:
    """A way to write the panorama of a place."""

    name: str
    write: Callable[[Place], bytes]
    expected: Expected = "as plain"
    says: str = ""
    """Words that what was read, or the refusal, has."""
    settings: PhotoSettings = field(default_factory=PhotoSettings)
    places: int = 0
    """So many places are enough; 0: all."""


@dataclass(frozen=True)
class Outcome:
    """What became of a way."""

    hits: Float[np.ndarray, " place"]
    """1 where the right tile came first; empty where all were refused."""
    likeness: float
    """Mean cosine with the vector of the plain file."""
    refused: int
    unsaid: int
    """Files of which what was read, or the refusal, lacks the words that it should have."""
    example: str


def render_places(seed: int, count: int) -> Iterator[Place]:
    """Render held-out places; the band is pasted into a sphere drawn with the same draws."""
    for number in itertools.count():
        world = build_world(world_seed(seed, FIRST_WORLD + number))
        for index, at in enumerate(itertools.islice(place_cameras(world), PER_WORLD)):
            if number * PER_WORLD + index == count:
                return

            def draw(stream: int, index: int = index, number: int = number) -> np.random.Generator:
                return np.random.default_rng([seed, number, index, stream])

            tile, _ = render_aerial(draw(0), world, at, 128)
            band, _ = render_panorama(draw(1), world, at, (HIGH, WIDTH))
            sphere, _ = render_panorama(draw(1), world, at, (HEIGHT, WIDTH), vertical_fov=180.0)
            sphere[TOP : TOP + HIGH] = band
            yield Place(images.encode(tile), band, sphere)


def gpano(form: str = "attributes", **properties: Any) -> bytes:
    """Return an XMP packet with GPano properties, as attributes or elements."""
    head = '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    start = f'<rdf:Description xmlns:GPano="{NAMESPACE}" '
    if form == "elements":
        inner = "".join(f"<GPano:{key}>{value}</GPano:{key}>" for key, value in properties.items())
        return f"{head}{start}>{inner}</rdf:Description></rdf:RDF>".encode()
    inner = " ".join(f'GPano:{key}="{value}"' for key, value in properties.items())
    return f"{head}{start}{inner}/></rdf:RDF>".encode()


def areas(
    full: tuple[int, int], size: tuple[int, int], corner: tuple[int, int], **others: Any
) -> bytes:
    """Return an XMP packet of a part of a sphere; each pair is (width, height) or (left, top)."""
    return gpano(
        ProjectionType="equirectangular",
        FullPanoWidthPixels=full[0],
        FullPanoHeightPixels=full[1],
        CroppedAreaImageWidthPixels=size[0],
        CroppedAreaImageHeightPixels=size[1],
        CroppedAreaLeftPixels=corner[0],
        CroppedAreaTopPixels=corner[1],
        **others,
    )


def exif(
    orientation: int = 0, direction: float | None = None, reference: str = "T", focal: int = 0
) -> bytes:
    """Return EXIF as cameras write it."""
    fields = Image.Exif()
    if orientation:
        fields[ExifTags.Base.Orientation] = orientation
    if direction is not None:
        position = fields.get_ifd(ExifTags.IFD.GPSInfo)
        position[ExifTags.GPS.GPSImgDirection] = direction
        position[ExifTags.GPS.GPSImgDirectionRef] = reference
    if focal:
        fields.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal
    return fields.tobytes()


def save(
    picture: Pixels | Image.Image, kind: str = "PNG", xmp: bytes = b"", **options: Any
) -> bytes:
    """Encode a picture with its metadata."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if xmp and kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp:
        options["xmp"] = xmp
    if kind == "JPEG":
        options.setdefault("quality", 92)
    if kind == "PNG":
        options.setdefault("compress_level", 1)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turn(pixels: Pixels, heading: float) -> Pixels:
    """Return what a camera takes whose middle looks along `heading`, to a column."""
    return np.roll(pixels, -round(heading / 360 * pixels.shape[1]), axis=1)


def resize(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize a picture, antialiased."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def tilt(sphere: Pixels, heading: float, pitch: float, roll: float) -> Pixels:
    """Return what a camera with a pose takes; a rotation of scipy's, not of what is measured."""
    big = resize(sphere, 2 * WIDTH, 2 * HEIGHT)
    height, width = big.shape[:2]
    azimuth = ((np.arange(width) + 0.5) / width * 2 - 1) * np.pi
    rise = (0.5 - (np.arange(height) + 0.5) / height)[:, None] * np.pi
    own = np.broadcast_arrays(
        np.cos(rise) * np.sin(azimuth), np.cos(rise) * np.cos(azimuth), np.sin(rise)
    )
    pose = Rotation.from_euler("ZXY", [-heading, pitch, roll], degrees=True)
    east, north, up = pose.apply(np.stack(own, axis=-1).reshape(-1, 3)).T
    return _sample(big, np.arctan2(east, north), np.arcsin(up.clip(-1, 1)), (height, width))


def look(sphere: Pixels, size: tuple[int, int], fov: float, heading: float) -> Pixels:
    """Return what a level pinhole camera takes; `size` is (height, width)."""
    height, width = size
    focal = width / 2 / np.tan(np.radians(fov) / 2)
    right = (np.arange(width) + 0.5 - width / 2) / focal
    up = (height / 2 - np.arange(height) - 0.5)[:, None] / focal
    azimuth = np.broadcast_to(np.arctan(right) + np.radians(heading), size)
    return _sample(sphere, azimuth.ravel(), np.arctan(up / np.hypot(1, right)).ravel(), size)


def _sample(
    sphere: Pixels,
    azimuth: Float[np.ndarray, " ray"],
    rise: Float[np.ndarray, " ray"],
    size: tuple[int, int],
) -> Pixels:
    height, width = sphere.shape[:2]
    place = [
        (0.5 - rise / np.pi) * height - 0.5,
        (azimuth / (2 * np.pi) + 0.5) % 1 * width + 1.5,
    ]
    padded = np.pad(sphere, ((0, 0), (2, 2), (0, 0)), "wrap").astype(np.float32)
    layers = [map_coordinates(padded[..., i], place, order=1, mode="nearest") for i in range(3)]
    return np.stack(layers, -1).reshape(*size, 3).round().clip(0, 255).astype(np.uint8)


def store_turned(pixels: Pixels, orientation: int) -> Pixels:
    """Return the pixels that a file stores whose EXIF orientation shows `pixels`."""
    undone = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }
    return np.ascontiguousarray(turned[undone])


SPHERE = gpano(ProjectionType="equirectangular")
WHOLE = ((WIDTH, HEIGHT), (WIDTH, HEIGHT), (0, 0))


def posed(heading: float, pitch: float, roll: float) -> bytes:
    """Return the XMP of a tilted sphere."""
    return gpano(
        ProjectionType="equirectangular",
        PoseHeadingDegrees=heading,
        PosePitchDegrees=pitch,
        PoseRollDegrees=roll,
    )


def with_alpha(pixels: Pixels, hole: bool = False) -> Image.Image:
    """Return a picture with an alpha channel, opaque but for a hole."""
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha[:40, :40] = 0 if hole else 255
    return Image.fromarray(np.dstack([pixels, alpha]))


def grey(pixels: Pixels) -> UInt8[np.ndarray, "h w"]:
    """Return the grey levels of a picture."""
    return np.asarray(Image.fromarray(pixels).convert("L"))


def barred(pixels: Pixels) -> Pixels:
    """Return a picture with black bars above and below."""
    changed = pixels.copy()
    changed[: HIGH // 5] = changed[-HIGH // 5 :] = 0
    return changed


def list_ways() -> list[Way]:
    """Return all ways; the first one is the plain file."""
    return [*_list_modes(), *_list_headings(), *_list_spheres(), *_list_parts(), *_list_photos()]


def _list_modes() -> list[Way]:
    turned = [
        Way(
            f"band, orientation {number}",
            lambda one, number=number: save(
                store_turned(one.band, number), "JPEG" if number % 2 else "PNG", exif=exif(number)
            ),
            says=f"orientation {number} applied",
        )
        for number in range(2, 9)
    ]
    return [
        Way("band, PNG (plain)", lambda one: save(one.band)),
        Way("band, JPEG", lambda one: save(one.band, "JPEG")),
        Way("band, WebP", lambda one: save(one.band, "WEBP", quality=90)),
        Way("band, HEIC", lambda one: _save_heic(one.band)),
        Way("band, twice as large", lambda one: save(resize(one.band, 2 * WIDTH, 2 * HIGH))),
        Way("band, RGBA, opaque", lambda one: save(with_alpha(one.band)), says="from RGBA"),
        Way(
            "band, RGBA with a hole",
            lambda one: save(with_alpha(one.band, hole=True)),
            "refused",
            "transparent",
        ),
        Way(
            "band, palette of 256",
            lambda one: save(Image.fromarray(one.band).quantize(256)),
            says="from P",
        ),
        Way(
            "band, CMYK",
            lambda one: save(Image.fromarray(one.band).convert("CMYK"), "JPEG"),
            says="from CMYK",
        ),
        Way("band, grey", lambda one: save(Image.fromarray(grey(one.band))), "named", "grey"),
        Way(
            "band, grey of 16 bits",
            lambda one: save(Image.fromarray(grey(one.band).astype(np.uint16) * 257)),
            "named",
            "grey",
        ),
        Way(
            "band, 12 of 16 bits",
            lambda one: save(Image.fromarray(grey(one.band).astype(np.uint16) * 16)),
            "refused",
            "16 bits",
        ),
        Way("band, half a file", lambda one: save(one.band)[:9000], "refused", "cannot be decoded"),
        Way("band, black bars", lambda one: save(barred(one.band)), "named", "black bars"),
        Way("band, one colour", lambda one: save(0 * one.band), "named", "one colour"),
        Way(
            "band, 4:1",
            lambda one: save(resize(one.band, WIDTH, WIDTH // 4)),
            says="taken for the trained band",
        ),
        *turned,
    ]


def _save_heic(pixels: Pixels) -> bytes:
    """Encode a picture as HEIC; without the plugin, what is refused with the name of the extra."""
    try:
        import pillow_heif  # noqa: PLC0415 (an extra)
    except ImportError:
        return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=90)
    return buffer.getvalue()


def _list_headings() -> list[Way]:
    doctype = b'<!DOCTYPE x [<!ENTITY a "90">]>'
    return [
        Way(
            "band, --heading 90",
            lambda one: save(turn(one.band, 90)),
            says="heading 90.0 (flag)",
            settings=PhotoSettings(heading=90.0),
        ),
        Way(
            "band, XMP heading 225, attribute",
            lambda one: save(turn(one.band, 225), "JPEG", gpano(PoseHeadingDegrees=225)),
            says="heading 225.0 (XMP)",
        ),
        Way(
            "band, XMP heading 225, element",
            lambda one: save(turn(one.band, 225), xmp=gpano("elements", PoseHeadingDegrees=225)),
            says="heading 225.0 (XMP)",
        ),
        Way(
            "band, EXIF direction 300",
            lambda one: save(turn(one.band, 300), "JPEG", exif=exif(direction=300.0)),
            says="heading 300.0 (EXIF)",
        ),
        Way(
            "band, EXIF direction 300, magnetic",
            lambda one: save(turn(one.band, 300), exif=exif(direction=300.0, reference="M")),
            says="magnetic north",
        ),
        Way(
            "band, XMP 90 and EXIF 180",
            lambda one: save(
                turn(one.band, 90), xmp=gpano(PoseHeadingDegrees=90), exif=exif(direction=180.0)
            ),
            says="EXIF says another heading",
        ),
        Way(
            "band, XMP 90, --heading 200 is right",
            lambda one: save(turn(one.band, 200), xmp=gpano(PoseHeadingDegrees=90)),
            says="heading 200.0 (flag)",
            settings=PhotoSettings(heading=200.0),
        ),
        Way(
            "band turned by 90, nothing says so",
            lambda one: save(turn(one.band, 90)),
            "named",
            "north assumed",
        ),
        Way(
            "band turned by 90, InitialView alone",
            lambda one: save(turn(one.band, 90), xmp=gpano(InitialViewHeadingDegrees=90)),
            "named",
            "where a viewer starts",
        ),
        Way(
            "band turned by 90, XMP with entities",
            lambda one: save(turn(one.band, 90), "JPEG", doctype + gpano(PoseHeadingDegrees=90)),
            "named",
            "document type",
        ),
    ]


def _list_spheres() -> list[Way]:
    def large(one: Place, width: int) -> Pixels:
        return resize(one.sphere, width, width // 2)

    tilts = [(0, 3, 0), (0, 10, 0), (0, 0, -10), (210, -7, 5), (90, 10, 10)]
    tilted = [
        Way(
            f"sphere, heading {heading}, pitch {pitch}, roll {roll}",
            lambda one, pose=(heading, pitch, roll): save(
                tilt(one.sphere, *pose), "JPEG", posed(*pose)
            ),
            says="level mended",
        )
        for heading, pitch, roll in tilts
    ]
    return [
        Way("sphere, PNG without XMP", lambda one: save(one.sphere), says="by its shape"),
        Way("sphere, JPEG", lambda one: save(one.sphere, "JPEG", SPHERE), says="by its XMP"),
        Way(
            "sphere, heading 137",
            lambda one: save(turn(one.sphere, 137), "JPEG", posed(137, 0, 0)),
            says="heading 137.0 (XMP)",
        ),
        Way("sphere, 352 x 176", lambda one: save(large(one, 352), "JPEG", SPHERE)),
        Way("sphere, 4096 x 2048", lambda one: save(large(one, 4096), "JPEG", SPHERE), places=12),
        Way("sphere, 16384 x 8192", lambda one: save(large(one, 16384), "JPEG", SPHERE), places=3),
        Way(
            "sphere, 16384 x 8192, PNG, tilted",
            lambda one: save(resize(tilt(one.sphere, 0, 6, -4), 16384, 8192), xmp=posed(0, 6, -4)),
            says="level mended",
            places=1,
        ),
        Way(
            "sphere, orientation 6",
            lambda one: save(store_turned(one.sphere, 6), "JPEG", SPHERE, exif=exif(6)),
            says="orientation 6 applied",
        ),
        *tilted,
        Way(
            "sphere, pitch 10, nothing says so",
            lambda one: save(tilt(one.sphere, 0, 10, 0), xmp=SPHERE),
            "not knowable",
        ),
        Way(
            "sphere, cylindrical by its XMP",
            lambda one: save(one.sphere, xmp=gpano(ProjectionType="cylindrical")),
            "refused",
            "cylindrical",
        ),
    ]


def _list_parts() -> list[Way]:
    def part(left: int, top: int, width: int, height: int, **others: Any) -> Callable[..., bytes]:
        xmp = areas(WHOLE[0], (width, height), (left, top), **others)
        return lambda one: save(
            np.roll(one.sphere, -left, axis=1)[top : top + height, :width], "JPEG", xmp
        )

    return [
        Way("part, 120 degrees high", part(0, 59, WIDTH, 234), says="part of a sphere"),
        Way("part, the band", part(0, TOP, WIDTH, HIGH), says="part of a sphere"),
        Way("part, another first column", part(250, 40, WIDTH, 280), says="part of a sphere"),
        Way(
            "part, file half as large as XMP says",
            lambda one: save(
                resize(one.sphere[40:320], WIDTH // 2, 140),
                "JPEG",
                areas(WHOLE[0], (WIDTH, 280), (0, 40)),
            ),
            says="part of a sphere",
        ),
        Way(
            "part, cut below the band",
            part(0, 0, WIDTH, 200),
            "named",
            "of the band filled",
        ),
        Way(
            "part, half a turn",
            part(WIDTH // 4, 40, WIDTH // 2, 280),
            "named",
            "of the band filled",
        ),
        Way("part, sky alone", part(0, 0, WIDTH, 100), "refused", "of the trained band"),
        Way(
            "band with its sphere's XMP, heading 90",
            lambda one: save(turn(one.band, 90), xmp=areas(*WHOLE, PoseHeadingDegrees=90)),
            says="areas are not used",
        ),
        Way(
            "sphere, XMP says 3:1",
            lambda one: save(one.sphere, xmp=areas((WIDTH, WIDTH // 3), *WHOLE[1:])),
            says="areas are not used",
        ),
        Way(
            "sphere, XMP without areas' corners",
            lambda one: save(
                one.sphere,
                xmp=gpano(ProjectionType="equirectangular", FullPanoWidthPixels=WIDTH),
            ),
            says="areas are not used",
        ),
        Way(
            "half a band, --fov 180",
            lambda one: save(one.band[:, WIDTH // 4 : -WIDTH // 4]),
            "named",
            "of the band filled",
            PhotoSettings(fov=180.0),
        ),
        Way(
            "half a band, nothing says so",
            lambda one: save(one.band[:, WIDTH // 4 : -WIDTH // 4]),
            "named",
            "times as wide as high",
        ),
    ]


def _list_photos() -> list[Way]:
    return [
        Way(
            "photo, --fov 90 --heading 40",
            lambda one: save(look(one.sphere, (300, 400), 90, 40), "JPEG"),
            "named",
            "of the band filled",
            PhotoSettings(fov=90.0, heading=40.0),
        ),
        Way(
            "photo, EXIF 18 mm, direction 200",
            lambda one: save(
                look(one.sphere, (400, 300), 2 * np.degrees(np.arctan(0.6 * 43.27 / 36)), 200),
                "JPEG",
                exif=exif(direction=200.0, focal=18),
            ),
            "named",
            "of the band filled",
        ),
        Way(
            "photo, nothing says how wide",
            lambda one: save(look(one.sphere, (300, 400), 90, 0), "JPEG"),
            "refused",
            "--fov",
        ),
        Way(
            "photo, 2:1, nothing says how wide",
            lambda one: save(look(one.sphere, (200, 400), 80, 0), "JPEG"),
            "refused",
            "--fov",
        ),
        Way(
            "tile, square",
            lambda one: one.tile,
            "refused",
            "--fov",
        ),
    ]


@functools.cache
def _load_query(model: str) -> EmbedQuery:
    return EmbedQuery(model, "G")


def embed_files(model: str, files: Sequence[bytes]) -> Float[np.ndarray, "file width"]:
    """Embed encoded bands as queries."""
    names = [str(number) for number in range(len(files))]
    columns = {schema.PAIR_ID: names, schema.GROUND: files, schema.ERROR: [None] * len(files)}
    batch = {name: schema.object_array(values) for name, values in columns.items()}
    return _load_query(model)(batch)[QUERY_VECTOR]


def measure(
    way: Way,
    places: Sequence[Place],
    model: str,
    tiles: Float[np.ndarray, "tile width"],
    plain: Float[np.ndarray, "tile width"],
) -> Outcome:
    """Write, read and search the panoramas of places."""
    bands, rows, refused, unsaid, example = [], [], 0, 0, ""
    for row, place in enumerate(places[: way.places or len(places)]):
        try:
            photo = read_photo(way.write(place), way.settings)
        except images.BadImage as error:
            refused, said = refused + 1, str(error)
        else:
            bands.append(photo.data)
            rows.append(row)
            said = str(photo.read)
        unsaid += way.says not in said
        example = example or said
    if not bands:
        return Outcome(np.empty(0), 0.0, refused, unsaid, example)
    vectors = embed_files(model, bands)
    scores = vectors @ tiles.T
    right = scores[np.arange(len(rows)), rows]
    # Ties count against the query.
    hits = (scores >= right[:, None]).sum(axis=1) == 1
    alike = (vectors * plain[rows]).sum(1) / np.linalg.norm(vectors, axis=1)
    likeness = float((alike / np.linalg.norm(plain[rows], axis=1)).mean())
    return Outcome(hits.astype(float), likeness, refused, unsaid, example)


def judge(way: Way, outcome: Outcome, plain: Float[np.ndarray, " place"]) -> str:
    """Return "yes", or what is not as it is expected to be."""
    count = way.places or len(plain)
    faults = []
    if way.expected == "refused":
        if outcome.refused < min(count, len(plain)):
            faults.append(f"{len(outcome.hits)} read")
    elif outcome.refused:
        faults.append(f"{outcome.refused} refused")
    if way.expected == "as plain" and len(outcome.hits):
        lost = plain[: len(outcome.hits)].mean() - outcome.hits.mean()
        if abs(lost) > POINT:
            faults.append(f"{-100 * lost:+.1f} points")
    if outcome.unsaid:
        faults.append(f"{outcome.unsaid} not said")
    return ", ".join(faults) or "yes"


def train_matcher(bench: InputsBench, at: str) -> str:
    """Train on G against C, or use what an earlier run kept; return the matcher's directory.

    In this process, without Ray: the pairs fit in memory.
    """
    matching = MatchingBench(quick=bench.quick, pairs=bench.pairs, epochs=bench.epochs)
    config = make_config(matching, at, ALONE, at, bench.seed)
    if os.path.exists(f"{config.output}/model.safetensors"):
        return config.output
    rows = render_rows(bench)
    torch.set_num_threads(1)  # two wait for each other where other work goes on
    torch.manual_seed(bench.seed)
    task = build_task(config).train()
    optimizer = torch.optim.AdamW(task.groups(), weight_decay=config.fit.weight_decay)
    steps = bench.epochs * (bench.pairs // config.fit.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(bench.seed)
    done = 0
    with progress.watch("steps", steps, lambda: done):
        for epoch in range(bench.epochs):
            shuffled = torch.randperm(bench.pairs, generator=order)
            for rows_of in shuffled.split(config.fit.batch)[: bench.pairs // config.fit.batch]:
                batch = {name: values[rows_of] for name, values in rows.items()}
                loss = task(batch | {"epoch": torch.tensor(epoch)})["loss"]
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(task.parameters(), config.fit.clip_norm)
                optimizer.step()
                schedule.step()
                done += 1
    task.save(config.output)
    return config.output


def render_rows(bench: InputsBench) -> dict[str, torch.Tensor]:
    """Render the training pairs, as the preset `standard` has them: `ground`, `aerial`, `key`."""
    pairs: list[Pair] = []
    worlds = itertools.count()
    with progress.watch("training pairs", bench.pairs, lambda: len(pairs)):
        while len(pairs) < bench.pairs:
            world = world_seed(bench.seed, next(worlds))
            pairs += render_pairs(world, PER_WORLD, Sizes(aerial=128, panorama=(64, 256)))
    chosen = pairs[: bench.pairs]
    keys = [rng.row_key(str(number)) for number in range(len(chosen))]

    def stack(pictures: list[Pixels]) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    return {
        "ground": stack([pair.panorama for pair in chosen]),
        "aerial": stack([pair.aerial for pair in chosen]),
        "key": torch.tensor(keys),
    }


def make_row(way: Way, outcome: Outcome, verdict: str) -> Mapping[str, Any]:
    """Return a row of the table."""
    return {
        "file": way.name,
        "expected": way.expected,
        "R@1, %": f"{100 * outcome.hits.mean():.1f}" if len(outcome.hits) else "",
        "cosine with plain": f"{outcome.likeness:.3f}" if len(outcome.hits) else "",
        "read": len(outcome.hits),
        "refused": outcome.refused,
        "as expected": verdict,
        "what is said": outcome.example.replace("|", "/"),
    }


def main(bench: InputsBench) -> None:
    """Train, render, write each way, and compare."""
    bench = fill_sizes(bench, SIZES[bench.quick])
    hardware.keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        at = os.path.abspath(bench.keep or temporary)
        model = train_matcher(bench, at)
        places: list[Place] = []
        with progress.watch("places", bench.places, lambda: len(places)):
            places.extend(render_places(bench.seed, bench.places))
        columns = {
            schema.PAIR_ID: [str(row) for row in range(len(places))],
            schema.AERIAL: [place.tile for place in places],
            schema.ERROR: [None] * len(places),
        }
        batch = {name: schema.object_array(values) for name, values in columns.items()}
        tiles = EmbedTile(model, 32)(batch)[TILE_VECTOR].astype(np.float32)
        ways = list_ways()
        reference = embed_files(model, [ways[0].write(place) for place in places])
        chosen = [
            way
            for way in ways
            if way is ways[0] or not bench.only or any(word in way.name for word in bench.only)
        ]
        outcomes: list[Outcome] = []
        with progress.watch("files", len(chosen), lambda: len(outcomes)), torch.inference_mode():
            for way in chosen:
                outcomes.append(measure(way, places, model, tiles, reference))
    plain = outcomes[0].hits
    verdicts = [judge(way, one, plain) for way, one in zip(chosen, outcomes, strict=True)]
    rows = [make_row(*each) for each in zip(chosen, outcomes, verdicts, strict=True)]
    figures = {
        "ways": len(chosen),
        "not_as_expected": sum(verdict != "yes" for verdict in verdicts),
        "plain": float(plain.mean()),
    }
    notes = (
        f"{bench.places} held-out places of the procedural world, each of which ranks the tiles of "
        f"all; rows with fewer read use the first ones. The plain file is the band, {WIDTH} x "
        f"{HIGH}, drawn by itself; the sphere, {WIDTH} x {HEIGHT}, is drawn with the same draws, "
        "and the band pasted into its middle, so that a sphere cut exactly is the plain file. "
        "Larger ones are enlarged from it. Spheres are tilted by scipy's rotations from a sphere "
        "of twice the size. Clouds of this world do not meet at the edges.",
        f"The matcher: G against C, {bench.pairs} pairs, {bench.epochs} epochs, panoramas of 64 x "
        "256 pixels, never shown a limited view: what is filled costs it more than a matcher of "
        "`--fov`.",
        "As expected: `as plain` is within one point of the plain file's R@1 of the same places, "
        "and nothing refused; `refused` is each file, with the reason; `named` is read, but what "
        "was lost or assumed stands in what is said, of each file; `not knowable` is what nothing "
        "in the file says. A 2:1 photo without metadata whose edges happen to meet is taken for a "
        "sphere, and `by its shape` says so.",
    )
    write_results(bench, "One panorama in many files", rows, figures, notes)


if __name__ == "__main__":
    main(parse_flags(InputsBench))
