"""Any photo of a place -> the panorama that the models were trained on, and what was read of it.

The trained band (CVUSA's) is GROUND_FOV degrees high around a level horizon, north in the middle
column. Whole spheres and parts of them are cut to it, tilted ones levelled, ordinary photos placed
where they look; what a picture does not show has the colour that a matcher of limited views was
trained with (`cvmatch.match.augment.crop_fov`). A picture that is the band already stays as it is.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from cvmatch.data import images
from cvmatch.data.images import BadImage
from cvmatch.data.photos.band import OVERSAMPLING, make_band
from cvmatch.data.photos.metadata import read_metadata
from cvmatch.data.photos.view import (
    BAND_RATIO,
    BAND_SIZE,
    HeadingSource,
    Pose,
    Projection,
    ProjectionSource,
    View,
    are_alike,
    check_edges,
    choose_heading,
    choose_view,
)
from cvmatch.data.settings import PhotoSettings
from cvmatch.nn.geometry import GROUND_FOV

_LEAST_COVER = 0.02  # of the band; below, nothing can be matched
_DARK, _FLAT = 8, 3  # levels up to which a row is black, and that one colour may differ by
_BAR = 0.02  # share of the height or width from which black bars are named


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
    """What says so; `search`: the best of those that were tried."""
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
        elif not are_alike(self.width / self.height, BAND_RATIO):
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
    view = choose_view(width, height, about, settings)
    heading, source, warnings = choose_heading(about, settings)
    pose = Pose(heading, about.pitch, about.roll)
    image = _load_reduced(header, view, width)
    view, more = check_edges(image, view, about, (width, height))
    read = PhotoReading(
        projection=view.projection,
        projection_source=view.source,
        width=width,
        height=height,
        heading=heading,
        heading_source=source,
        pitch=pose.pitch,
        roll=pose.roll,
        fov=view.fov,
        orientation=orientation,
        mode=mode,
        warnings=(*about.warnings, *view.warnings, *warnings, *more),
    )
    image = image.convert("RGB")
    too_large = width * height > images.MAX_PIXELS  # for the decoder of rows
    if view.projection == "band" and too_large:
        image = image.resize((BAND_SIZE[1], BAND_SIZE[0]), Image.Resampling.BICUBIC)
    if view.projection == "band" and pose == Pose():
        pixels = np.asarray(image)
        return Photo(images.encode(pixels) if too_large else data, _add_faults(read, pixels))
    pixels, seen = make_band(image, view.scale(image.width / width), pose)
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


def _load_reduced(header: Image.Image, view: View, width: int) -> Image.Image:
    """Decode a picture; a JPEG at a reduced scale where that is still finer than its samples."""
    factor = OVERSAMPLING * BAND_SIZE[1] / view.turn_width(width)
    if view.projection != "band" and factor < 0.5:
        header.draft(None, (math.ceil(header.width * factor), math.ceil(header.height * factor)))
    return images.load_image(header)


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
