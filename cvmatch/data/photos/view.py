"""Which directions a picture shows: by its metadata, what the user says, and its shape.

Signs of a pose, by "Photo Sphere XMP Metadata" (developers.google.com/streetview/
spherical-metadata): heading is clockwise from north, pitch above the horizon, both of the middle of
the whole sphere (they do not change by a crop); as roll grows, the horizon turns counter-clockwise
in the picture. The camera is rolled about where it looks, then pitched, then turned.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from cvmatch.data.images import BadImage
from cvmatch.data.photos.metadata import Metadata, SphereArea
from cvmatch.data.settings import PhotoSettings

BAND_SIZE = (224, 1232)
"""Height and width in pixels of a band that is made: CVUSA's; less where a picture has less."""

BAND_RATIO = BAND_SIZE[1] / BAND_SIZE[0]
"""Its width for its height."""

NARROWEST_BAND = 2.5
"""Pictures at least so wide for their height, which say nothing, are bands of a whole turn."""

Projection = Literal["band", "sphere", "part of a sphere", "photo"]
ProjectionSource = Literal["XMP", "flag", "EXIF", "shape"]
HeadingSource = Literal["flag", "XMP", "EXIF", "EXIF, magnetic north", "assumed", "search"]

_ALIKE = 0.02  # relative difference of shapes up to which they are the same
_LOW, _HIGH = 0.7, 1.4  # shapes relative to the band's between which nothing is warned of
_WIDEST_PHOTO = 150.0  # degrees; beyond, a plane projection is no camera's
_APART = 10.0  # degrees between two headings from which they contradict each other
_SEAM = 5.0  # times that columns at the edges may differ more than neighbours do
_FILM_DIAGONAL = math.hypot(36, 24)  # millimetres: to what FocalLengthIn35mmFilm refers


@dataclass(frozen=True)
class Pose:
    """How a camera was held, in degrees."""

    heading: float = 0.0
    """Clockwise from north, of the picture's middle."""
    pitch: float = 0.0
    """Above the horizon, of the picture's middle."""
    roll: float = 0.0
    """By which the camera leaned to its right."""

    @property
    def is_level(self) -> bool:
        """Whether the horizon is straight and at half the sphere's height."""
        return not (self.pitch or self.roll)


@dataclass(frozen=True)
class View:
    """A picture's projection, and how much of the sphere it shows."""

    projection: Projection
    source: ProjectionSource
    area: SphereArea | None = None
    """Of a sphere, in the picture's pixels; None: a photo."""
    fov: float = 360.0
    warnings: tuple[str, ...] = ()

    def scale(self, factor: float) -> "View":
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


def choose_view(width: int, height: int, about: Metadata, settings: PhotoSettings) -> View:
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
        if not _LOW <= ratio / BAND_RATIO <= _HIGH:
            warnings = (f"{ratio:.1f} times as wide as high, where the trained band has 5.5",)
        return View("band", "shape", _centre(width, height), warnings=warnings)
    if are_alike(ratio, 2.0):
        return _view_of(_centre(width, height), "shape")
    if about.focal_length and not marked:
        return _view_of_fov(width, height, _measure_fov(about, width, height), "EXIF")
    raise BadImage(
        f"{width} x {height} pixels, no panorama of a whole turn (2:1, or 1232 x 224) and without "
        "EXIF's FocalLengthIn35mmFilm: say how many degrees it shows from left to right with --fov"
        + "".join(f" ({one})" for one in warnings)
    )


def are_alike(one: float, other: float) -> bool:
    """Return whether two shapes (width / height) are the same but for rounding."""
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
    if not are_alike(area.full_width / area.full_height, 2.0):
        return None, f"a sphere of {area.full_width:g} x {area.full_height:g}, not 2:1"
    if not are_alike(area.width / area.height, width / height):
        return None, f"{area.width:g} x {area.height:g} of a picture of {width} x {height}"
    if area.width > area.full_width * (1 + _ALIKE) or not (
        -1 <= area.top <= area.full_height * (1 + _ALIKE) - area.height
    ):
        return None, "a part that leaves the sphere"
    scale = width / area.width
    return SphereArea(*(value * scale for value in vars(area).values())), None


def _view_of(area: SphereArea, source: ProjectionSource, warnings: tuple[str, ...] = ()) -> View:
    whole = area.width >= area.full_width - 1 and area.height >= area.full_height - 1
    fov = min(360.0, 360 * area.width / area.full_width)
    projection: Projection = "sphere" if whole else "part of a sphere"
    return View(projection, source, area, fov, warnings)


def _view_of_fov(
    width: int, height: int, fov: float, source: ProjectionSource, warnings: tuple[str, ...] = ()
) -> View:
    """Return the view of a picture so many degrees wide: a photo, or part of a turn if wide."""
    if width >= NARROWEST_BAND * height or (fov == 360 and are_alike(width / height, 2.0)):
        return _view_of(_centre(width, height, fov), source, warnings)
    if fov > _WIDEST_PHOTO:
        raise BadImage(
            f"{fov:.1f} degrees wide, expected at most {_WIDEST_PHOTO:g} of a photo of "
            f"{width} x {height} pixels"
        )
    return View("photo", source, None, fov, warnings)


def _measure_fov(about: Metadata, width: int, height: int) -> float:
    """Return the degrees from left to right of a focal length, which is of the film's diagonal."""
    film = _FILM_DIAGONAL * width / math.hypot(width, height)
    return math.degrees(2 * math.atan(film / 2 / (about.focal_length or math.inf)))


def check_edges(
    image: Image.Image, view: View, about: Metadata, size: tuple[int, int]
) -> tuple[View, list[str]]:
    """Check that what seems a whole turn is one: its left and right edges meet.

    Raises:
        BadImage: 2:1, but no sphere, and nothing says how wide a view it shows.
    """
    if view.source != "shape" or _edges_meet(image):
        return view, []
    if view.projection == "band":
        return view, ["its left and right edges do not meet: a whole turn? --fov if it is less"]
    if about.focal_length:
        return _view_of_fov(*size, _measure_fov(about, *size), "EXIF", view.warnings), []
    raise BadImage(
        f"{size[0]} x {size[1]} pixels like a whole sphere, but its left and right edges do not "
        "meet: say with --fov how many degrees it shows from left to right (360: a sphere)"
    )


def _edges_meet(image: Image.Image) -> bool:
    """Whether the right edge of a picture goes on at its left edge.

    Compared with neighbouring columns, in the lower half: clouds move while a camera turns.
    """
    small = image.convert("RGB").resize((256, 64), Image.Resampling.BOX)
    ground = np.asarray(small)[32:].astype(np.float32)
    steps = np.abs(np.diff(ground, axis=1)).mean(axis=(0, 2))
    return float(np.abs(ground[:, -1] - ground[:, 0]).mean()) <= _SEAM * float(np.median(steps)) + 3
