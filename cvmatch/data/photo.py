"""Any photo of a place -> the panorama that the models were trained on, and what was read of it.

The trained band (CVUSA's) is GROUND_FOV degrees high around a level horizon, north in the middle
column. Whole spheres and parts of them are cut to it, tilted ones levelled, ordinary photos placed
where they look; what a picture does not show has the colour that a matcher of limited views was
trained with (`cvmatch.match.augment.crop_fov`). A picture that is the band already stays as it is.

Signs of a pose, by "Photo Sphere XMP Metadata" (developers.google.com/streetview/
spherical-metadata): heading is clockwise from north, pitch above the horizon, both of the middle of
the whole sphere (they do not change by a crop); as roll grows, the horizon turns counter-clockwise
in the picture. The camera is rolled about where it looks, then pitched, then turned.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch.nn import functional as F

from cvmatch.data import images
from cvmatch.data.geometry import GROUND_FOV
from cvmatch.data.images import BadImage
from cvmatch.data.metadata import Metadata, SphereArea, read_metadata
from cvmatch.data.settings import PhotoSettings
from cvmatch.nn.backbones import MEAN

BAND_SIZE = (224, 1232)
"""Height and width in pixels of a band that is made: CVUSA's; less where a picture has less."""

NARROWEST_BAND = 2.5
"""Pictures at least so wide for their height, which say nothing, are bands of a whole turn."""

Projection = Literal["band", "sphere", "part of a sphere", "photo"]
ProjectionSource = Literal["XMP", "flag", "EXIF", "shape"]
HeadingSource = Literal["flag", "XMP", "EXIF", "EXIF, magnetic north", "assumed"]

_BAND_RATIO = BAND_SIZE[1] / BAND_SIZE[0]
_ALIKE = 0.02  # relative difference of shapes up to which they are the same
_LOW, _HIGH = 0.7, 1.4  # shapes relative to the band's between which nothing is warned of
_WIDEST_PHOTO = 150.0  # degrees; beyond, a plane projection is no camera's
_LEAST_COVER = 0.02  # of the band; below, nothing can be matched
_APART = 10.0  # degrees between two headings from which they contradict each other
_OVERSAMPLING = 2  # samples a pixel and axis, so that resampling does not alias
_DARK, _FLAT = 8, 3  # levels up to which a row is black, and that one colour may differ by
_SEAM = 5.0  # times that columns at the edges may differ more than neighbours do
_BAR = 0.02  # share of the height or width from which black bars are named
_FILM_DIAGONAL = math.hypot(36, 24)  # millimetres: to what FocalLengthIn35mmFilm refers


@dataclass(frozen=True)
class PhotoReading:
    """What was read of a picture, and what was assumed."""

    projection: Projection
    projection_source: ProjectionSource
    """What says so: `shape` is an assumption."""
    width: int
    """Of the upright picture, in pixels."""
    height: int
    heading: float = 0.0
    """Where its middle looks, in degrees clockwise from north."""
    heading_source: HeadingSource = "assumed"
    pitch: float = 0.0
    """Degrees above the horizon at which its middle looked; mended."""
    roll: float = 0.0
    """Degrees by which the camera leaned to its right; mended."""
    fov: float = 360.0
    """Degrees that it shows from left to right."""
    covered: float = 1.0
    """Share of the trained band that it shows, in [0, 1]; the rest is filled."""
    orientation: int = 1
    """EXIF's, which was applied."""
    mode: str = "RGB"
    """How the file stores its colours."""
    warnings: tuple[str, ...] = ()
    """What may make the result wrong."""

    def __str__(self) -> str:
        parts = [f"{self.projection} {self.width} x {self.height}"]
        if self.projection != "band":
            parts[0] += f" (by its {self.projection_source})".replace("its flag", "--fov")
        elif not _alike(self.width / self.height, _BAND_RATIO):
            parts.append("taken for the trained band")
        if self.fov < 360:
            parts.append(f"{self.fov:.1f} degrees wide")
        parts.append(
            "north assumed in the middle"
            if self.heading_source == "assumed"
            else f"heading {self.heading:.1f} ({self.heading_source})"
        )
        if self.pitch or self.roll:
            parts.append(f"level mended by {0 - self.pitch:.1f} / {0 - self.roll:.1f} degrees")
        if self.orientation != 1:
            parts.append(f"orientation {self.orientation} applied")
        if self.mode in ("1", "L", "LA") or self.mode.startswith("I"):
            parts.append("grey")
        if self.mode not in ("RGB", "L"):
            parts.append(f"converted from {self.mode}")
        if self.covered < 0.995:
            parts.append(f"{1 - self.covered:.0%} of the band filled")
        return "; ".join([", ".join(parts), *self.warnings])


@dataclass(frozen=True)
class Photo:
    """A picture as the panorama that the models take."""

    data: bytes
    """Encoded band, north in the middle; the file's own bytes where nothing had to be changed."""
    read: PhotoReading


@dataclass(frozen=True)
class _View:
    """Which directions a picture shows."""

    projection: Projection
    source: ProjectionSource
    area: SphereArea | None = None
    """Of a sphere, in the picture's pixels; None: a photo."""
    fov: float = 360.0
    warnings: tuple[str, ...] = ()

    def scaled(self, factor: float) -> "_View":
        """Return the view of the picture resized by a factor."""
        if self.area is None:
            return self
        area = SphereArea(*(value * factor for value in vars(self.area).values()))
        return replace(self, area=area)

    def turn_width(self, width: int) -> float:
        """Return the pixels of a whole turn, as densely as in the middle of the picture."""
        if self.area is not None:
            return self.area.full_width
        return math.pi * width / math.tan(math.radians(self.fov) / 2)


def read_photo(data: bytes, settings: PhotoSettings | None = None) -> Photo:
    """Read a picture as the panorama that the models take.

    Args:
        data: Encoded picture.
        settings: What is known of it besides.

    Raises:
        BadImage: it cannot be decoded; it is of another projection; it is an ordinary photo and
            nothing says how wide a view it shows; or it shows too little of the band.
    """
    settings = settings or PhotoSettings()
    header = _read_header(data, settings.max_pixels)
    about = read_metadata(header)
    orientation, mode = images.read_orientation(header), header.mode
    width, height = header.size if orientation < 5 else (header.height, header.width)
    view = _choose_view(width, height, about, settings)
    heading, source, warnings = choose_heading(about, settings)
    image = _load_reduced(header, view, width)
    view, more = _check_edges(image, view, about, (width, height))
    read = PhotoReading(
        projection=view.projection,
        projection_source=view.source,
        width=width,
        height=height,
        heading=heading,
        heading_source=source,
        pitch=about.pitch,
        roll=about.roll,
        fov=view.fov,
        orientation=orientation,
        mode=mode,
        warnings=(*about.warnings, *view.warnings, *warnings, *more),
    )
    image = image.convert("RGB")
    too_large = width * height > images.MAX_PIXELS  # for the decoder of rows
    if view.projection == "band" and too_large:
        image = image.resize((BAND_SIZE[1], BAND_SIZE[0]), Image.Resampling.BICUBIC)
    if view.projection == "band" and not (heading or about.pitch or about.roll):
        pixels = np.asarray(image)
        return Photo(images.encode(pixels) if too_large else data, _add_faults(read, pixels))
    pixels, seen = _make_band(image, view.scaled(image.width / width), read)
    read = replace(read, covered=1.0 if seen is None else float(seen.mean()))
    if read.covered < _LEAST_COVER:
        raise BadImage(
            f"{width} x {height} pixels that show {read.covered:.1%} of the trained band, "
            f"{GROUND_FOV:.0f} degrees high around the horizon"
        )
    return Photo(images.encode(pixels), _add_faults(read, pixels, seen))


def _read_header(data: bytes, max_pixels: int) -> Image.Image:
    try:
        return images.read_header(data, max_pixels)
    except images.TooLarge as error:
        raise images.TooLarge(f"{error}. --max-pixels allows more") from error


def choose_heading(
    about: Metadata, settings: PhotoSettings
) -> tuple[float, HeadingSource, list[str]]:
    """Return a picture's heading in degrees, [0, 360), who says so, and warnings.

    The flag goes before XMP, XMP before EXIF; if XMP and EXIF contradict each other, that is said.
    """
    if settings.heading is not None:
        return settings.heading % 360, "flag", []
    if about.heading is not None:
        warnings = []
        if about.direction is not None and _angle(about.heading, about.direction) > _APART:
            warnings.append(
                f"EXIF says another heading, {about.direction:.1f}: XMP's is taken; --heading "
                "takes the place of both"
            )
        return about.heading, "XMP", warnings
    if about.direction is not None:
        return about.direction, "EXIF, magnetic north" if about.magnetic else "EXIF", []
    return 0.0, "assumed", []


def _angle(one: float, other: float) -> float:
    return abs((one - other + 180) % 360 - 180)


def _choose_view(width: int, height: int, about: Metadata, settings: PhotoSettings) -> _View:
    """Decide by metadata, settings and shape what a picture is.

    Raises:
        BadImage: it cannot be told; the message names the flag.
    """
    if about.projection and about.projection != "equirectangular":
        raise BadImage(
            f"XMP ProjectionType {about.projection}, expected equirectangular. Convert it, or crop "
            "it to the band that the models were trained on, 1232 x 224"
        )
    marked, ratio = bool(about.projection) or about.area is not None, width / height
    unused = ("fov not used: XMP says what it shows",) if settings.fov else ()
    warnings: tuple[str, ...] = ()
    if about.area is not None:
        area, fault = _fit_area(about.area, width, height)
        if area is not None:
            return _view_of(area, "XMP", unused)
        warnings = (f"XMP's areas are not used: {fault}",)
    if marked and ratio > 2 * (1 - _ALIKE):
        return _view_of(_centre(width, height), "XMP", warnings + unused)
    if settings.fov is not None:
        return _view_of_fov(width, height, settings.fov, "flag", warnings)
    if ratio >= NARROWEST_BAND:
        if not _LOW <= ratio / _BAND_RATIO <= _HIGH:
            warnings = (f"{ratio:.1f} times as wide as high, where the trained band has 5.5",)
        return _View("band", "shape", _centre(width, height), warnings=warnings)
    if _alike(ratio, 2.0):
        return _view_of(_centre(width, height), "shape")
    if about.focal_length and not marked:
        return _view_of_fov(width, height, _measure_fov(about, width, height), "EXIF")
    raise BadImage(
        f"{width} x {height} pixels, no panorama of a whole turn (2:1, or 1232 x 224) and without "
        "EXIF's FocalLengthIn35mmFilm: say how many degrees it shows from left to right with --fov"
        + "".join(f" ({one})" for one in warnings)
    )


def _alike(one: float, other: float) -> bool:
    return abs(one / other - 1) <= _ALIKE


def _centre(width: int, height: int, fov: float = 360.0) -> SphereArea:
    """Return the area of a picture with the horizon at half its height."""
    full = width * 360 / fov
    left, top = (full - width) / 2, (full / 2 - height) / 2
    return SphereArea(full, full / 2, float(width), float(height), left, top)


def _fit_area(
    area: SphereArea, width: int, height: int
) -> tuple[SphereArea, None] | tuple[None, str]:
    """Return XMP's areas in the picture's own pixels, which may have been resized; or the fault."""
    if min(area.full_width, area.full_height, area.width, area.height) < 1:
        return None, "a size below 1"
    if not _alike(area.full_width / area.full_height, 2.0):
        return None, f"a sphere of {area.full_width:g} x {area.full_height:g}, not 2:1"
    if not _alike(area.width / area.height, width / height):
        return None, f"{area.width:g} x {area.height:g} of a picture of {width} x {height}"
    if area.width > area.full_width * (1 + _ALIKE) or not (
        -1 <= area.top <= area.full_height * (1 + _ALIKE) - area.height
    ):
        return None, "a part that leaves the sphere"
    scale = width / area.width
    return SphereArea(*(value * scale for value in vars(area).values())), None


def _view_of(area: SphereArea, source: ProjectionSource, warnings: tuple[str, ...] = ()) -> _View:
    whole = area.width >= area.full_width - 1 and area.height >= area.full_height - 1
    fov = min(360.0, 360 * area.width / area.full_width)
    projection: Projection = "sphere" if whole else "part of a sphere"
    return _View(projection, source, area, fov, warnings)


def _view_of_fov(
    width: int, height: int, fov: float, source: ProjectionSource, warnings: tuple[str, ...] = ()
) -> _View:
    """Return the view of a picture so many degrees wide: a photo, or part of a turn if wide."""
    if width >= NARROWEST_BAND * height or (fov == 360 and _alike(width / height, 2.0)):
        return _view_of(_centre(width, height, fov), source, warnings)
    if fov > _WIDEST_PHOTO:
        raise BadImage(
            f"{fov:.1f} degrees wide, expected at most {_WIDEST_PHOTO:g} of a photo of "
            f"{width} x {height} pixels"
        )
    return _View("photo", source, None, fov, warnings)


def _measure_fov(about: Metadata, width: int, height: int) -> float:
    """Return the degrees from left to right of a focal length, which is of the film's diagonal."""
    film = _FILM_DIAGONAL * width / math.hypot(width, height)
    return math.degrees(2 * math.atan(film / 2 / (about.focal_length or math.inf)))


def _load_reduced(header: Image.Image, view: _View, width: int) -> Image.Image:
    """Decode a picture; a JPEG at a reduced scale where that is still finer than its samples."""
    factor = _OVERSAMPLING * BAND_SIZE[1] / view.turn_width(width)
    if view.projection != "band" and factor < 0.5:
        header.draft(None, (math.ceil(header.width * factor), math.ceil(header.height * factor)))
    return images.load_image(header)


def _check_edges(
    image: Image.Image, view: _View, about: Metadata, size: tuple[int, int]
) -> tuple[_View, list[str]]:
    """Check that what seems a whole turn is one: its left and right edges meet.

    Raises:
        BadImage: 2:1, but no sphere, and nothing says how wide a view it shows.
    """
    if view.source != "shape" or edges_meet(image):
        return view, []
    if view.projection == "band":
        return view, ["its left and right edges do not meet: a whole turn? --fov if it is less"]
    if about.focal_length:
        return _view_of_fov(*size, _measure_fov(about, *size), "EXIF", view.warnings), []
    raise BadImage(
        f"{size[0]} x {size[1]} pixels like a whole sphere, but its left and right edges do not "
        "meet: say with --fov how many degrees it shows from left to right (360: a sphere)"
    )


def edges_meet(image: Image.Image) -> bool:
    """Whether the right edge of a picture goes on at its left edge.

    Compared with neighbouring columns, in the lower half: clouds move while a camera turns.
    """
    small = image.convert("RGB").resize((256, 64), Image.Resampling.BOX)
    ground = np.asarray(small)[32:].astype(np.float32)
    steps = np.abs(np.diff(ground, axis=1)).mean(axis=(0, 2))
    return float(np.abs(ground[:, -1] - ground[:, 0]).mean()) <= _SEAM * float(np.median(steps)) + 3


def _make_band(
    image: Image.Image, view: _View, read: PhotoReading
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"] | None]:
    """Return the band, and which of its pixels the picture shows; None: all."""
    level = not (read.pitch or read.roll)
    area = view.area
    if level and view.projection == "band":
        return _turn(np.asarray(image), read.heading), None
    width = min(BAND_SIZE[1], round(view.turn_width(image.width)))
    size = (max(1, round(width / _BAND_RATIO)), max(1, width))
    if area is not None and level and view.fov == 360:
        high = area.full_width / _BAND_RATIO
        top = area.full_height / 2 - high / 2 - area.top
        if top > -0.5 and top + high < image.height + 0.5:
            box = (0, max(0, top), image.width, min(image.height, top + high))
            small = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box)
            # The middle of a picture may not be the sphere's.
            middle = (area.left + area.width / 2 - area.full_width / 2) / area.full_width * 360
            return _turn(np.asarray(small), read.heading + middle), None
    return _resample(image, view, read, size)


def _turn(pixels: UInt8[np.ndarray, "h w 3"], heading: float) -> UInt8[np.ndarray, "h w 3"]:
    """Roll the columns so that north comes to the middle, by whole pixels."""
    return np.roll(pixels, round(heading / 360 * pixels.shape[1]), axis=1)


def _resample(
    image: Image.Image, view: _View, read: PhotoReading, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """Sample a picture at the directions of a band of `size`; fill what it does not show."""
    factor = _OVERSAMPLING * size[1] / view.turn_width(image.width)
    if factor < 1:
        reduced = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        view = view.scaled(reduced[0] / image.width)
        image = image.resize(reduced, Image.Resampling.BICUBIC)
    rays = rotate_rays(
        band_rays(size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING),
        read.heading,
        read.pitch,
        read.roll,
    )
    x, y, seen = _project(rays, view, image.width, image.height)
    sampled = _sample(np.asarray(image), x, y, wrap=view.area is not None and view.fov == 360)
    shown = seen[..., None].astype(np.float32)
    fill = 255 * np.array(MEAN, np.float32)
    mixed = _mean_blocks(sampled * shown + fill * (1 - shown))
    return mixed.round().clip(0, 255).astype(np.uint8), _mean_blocks(shown)[..., 0] > 0.5


def band_rays(height: int, width: int) -> Float[np.ndarray, "height width 3"]:
    """Return the directions (east, north, up) of the pixels of a band, north in the middle."""
    azimuth = ((np.arange(width) + 0.5) / width - 0.5) * 2 * math.pi
    rise = np.radians((0.5 - (np.arange(height) + 0.5) / height) * GROUND_FOV)[:, None]
    east, north = np.cos(rise) * np.sin(azimuth), np.cos(rise) * np.cos(azimuth)
    return np.stack([east, north, np.broadcast_to(np.sin(rise), east.shape)], axis=-1)


def rotate_rays(
    rays: Float[np.ndarray, "height width 3"], heading: float, pitch: float, roll: float
) -> Float[np.ndarray, "height width 3"]:
    """Return directions (east, north, up) as a camera with a pose has them: right, ahead, up."""
    turn, rise, lean = (math.radians(angle) for angle in (heading, pitch, roll))
    ahead = np.array(
        [math.sin(turn) * math.cos(rise), math.cos(turn) * math.cos(rise), math.sin(rise)]
    )
    level = np.array([math.cos(turn), -math.sin(turn), 0.0])
    above = np.cross(level, ahead)
    right = math.cos(lean) * level - math.sin(lean) * above
    up = math.cos(lean) * above + math.sin(lean) * level
    return rays @ np.stack([right, ahead, up], axis=1)


def _project(
    rays: Float[np.ndarray, "height width 3"], view: _View, width: int, height: int
) -> tuple[
    Float[np.ndarray, "height width"],
    Float[np.ndarray, "height width"],
    Bool[np.ndarray, "height width"],
]:
    """Return where directions of the camera lie in the picture (x, y in pixels), and whether."""
    right, ahead, up = np.moveaxis(rays, -1, 0)
    if view.area is None:
        focal = width / 2 / math.tan(math.radians(view.fov) / 2)
        depth = np.maximum(ahead, 1e-6)
        x, y = width / 2 + focal * right / depth, height / 2 - focal * up / depth
        return x, y, (ahead > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    area = view.area
    x = (np.arctan2(right, ahead) / (2 * math.pi) + 0.5) * area.full_width - area.left
    y = (0.5 - np.arcsin(up.clip(-1, 1)) / math.pi) * area.full_height - area.top
    x %= area.full_width
    # A whole turn may lack a fraction of a pixel.
    inside = (x < width) | (view.fov == 360)
    return x.clip(0, width), y, inside & (y >= 0) & (y < height)


def _sample(
    pixels: UInt8[np.ndarray, "h w 3"],
    x: Float[np.ndarray, "height width"],
    y: Float[np.ndarray, "height width"],
    wrap: bool,
) -> Float[np.ndarray, "height width 3"]:
    """Sample pixels bilinearly at places in pixels (0.5 is the middle of the first)."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (0, 0)), "wrap" if wrap else "edge")
    place = np.stack([(x + 1) / padded.shape[1], y / padded.shape[0]], axis=-1) * 2 - 1
    source = torch.from_numpy(padded).permute(2, 0, 1)[None].float()
    grid = torch.from_numpy(place)[None].float()
    sampled = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    return sampled[0].permute(1, 2, 0).numpy()


def _mean_blocks(
    values: Float[np.ndarray, "height width channel"],
) -> Float[np.ndarray, "h w channel"]:
    height, width = (length // _OVERSAMPLING for length in values.shape[:2])
    blocks = values.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, -1)
    return blocks.mean(axis=(1, 3))


def _add_faults(
    read: PhotoReading,
    pixels: UInt8[np.ndarray, "h w 3"],
    seen: Bool[np.ndarray, "h w"] | None = None,
) -> PhotoReading:
    """Name what no street looks like among the pixels that a picture shows."""
    if seen is None:
        seen = np.ones(pixels.shape[:2], bool)
    shown = pixels[seen]
    if (np.ptp(shown, axis=0) <= _FLAT).all():
        return _add_warnings(read, "one colour all over")
    dark = pixels.max(axis=2) <= _DARK
    for axis, name in ((1, "height"), (0, "width")):
        lines = (dark | ~seen).all(axis=axis)[seen.any(axis=axis)]
        if (share := _edge_share(lines)) > _BAR:
            read = _add_warnings(read, f"black bars over {share:.0%} of its {name}")
    return read


def _edge_share(dark: Bool[np.ndarray, " line"]) -> float:
    """Return the share of the lines that are dark from either end on."""
    bright = np.flatnonzero(~dark)
    return 1.0 if not len(bright) else 1 - float(bright[-1] - bright[0] + 1) / len(dark)


def _add_warnings(read: PhotoReading, *warnings: str) -> PhotoReading:
    return replace(read, warnings=(*read.warnings, *warnings))
