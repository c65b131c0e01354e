"""What a picture says of itself: EXIF, and the XMP of photo spheres (GPano).

Names and meaning: "Photo Sphere XMP Metadata", developers.google.com/streetview/spherical-metadata.
XMP comes from strangers: a packet with a document type, which alone can name entities, is not read.
"""

import math
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

NAMESPACE = "http://ns.google.com/photos/1.0/panorama/"

_MAX_PACKET = 2**20  # bytes; a JPEG's first packet has at most 64 KiB
_AREA = (
    "FullPanoWidthPixels",
    "FullPanoHeightPixels",
    "CroppedAreaImageWidthPixels",
    "CroppedAreaImageHeightPixels",
    "CroppedAreaLeftPixels",
    "CroppedAreaTopPixels",
)


@dataclass(frozen=True)
class SphereArea:
    """Which part of a whole sphere a picture shows, in pixels."""

    full_width: float
    full_height: float
    width: float
    height: float
    left: float = 0.0
    """Column of the sphere at the picture's left edge; the sphere's middle is `full_width` / 2."""
    top: float = 0.0
    """Row of the sphere at the picture's upper edge; the horizon is `full_height` / 2."""


@dataclass(frozen=True)
class Metadata:
    """What is known of a picture; angles in degrees."""

    projection: str = ""
    """GPano's ProjectionType in lower case; empty: it says none."""
    area: SphereArea | None = None
    """GPano's cropped area and full panorama, as it states them."""
    heading: float | None = None
    """GPano's PoseHeadingDegrees: where the sphere's middle looks, clockwise from north."""
    pitch: float = 0.0
    """GPano's PosePitchDegrees: how far above the horizon the sphere's middle looks."""
    roll: float = 0.0
    """GPano's PoseRollDegrees: how far the camera leaned to its right."""
    direction: float | None = None
    """EXIF's GPSImgDirection: where the camera looked, clockwise from north."""
    magnetic: bool = False
    """Whether that is magnetic north (GPSImgDirectionRef)."""
    focal_length: float | None = None
    """EXIF's FocalLengthIn35mmFilm, in millimetres."""
    position: tuple[float, float] | None = None
    """EXIF's GPSLatitude and GPSLongitude, in degrees to the north and to the east."""
    warnings: tuple[str, ...] = ()
    """What cannot be used, and why."""


def read_metadata(image: Image.Image) -> Metadata:
    """Read the metadata of an opened picture; what is damaged becomes a warning."""
    fields, faults = _read_exif(image)  # first: of a PNG it decodes what follows the pixels
    gpano, more = parse_gpano(image.info.get("xmp", b""))
    faults += more
    numbers: dict[str, float] = {}
    for name in (*_AREA, "PoseHeadingDegrees", "PosePitchDegrees", "PoseRollDegrees"):
        if name in gpano:
            number = _to_number(gpano[name])
            if number is None:
                faults.append(f"XMP {name} is {gpano[name][:40]!r}, no number")
            else:
                numbers[name] = number
    heading = numbers.get("PoseHeadingDegrees")
    if heading is None and "InitialViewHeadingDegrees" in gpano:
        faults.append("XMP InitialViewHeadingDegrees is where a viewer starts, no heading")
    return Metadata(
        projection=gpano.get("ProjectionType", "").lower(),
        area=_read_area(numbers, faults),
        heading=None if heading is None else heading % 360,
        pitch=numbers.get("PosePitchDegrees", 0.0),
        roll=numbers.get("PoseRollDegrees", 0.0),
        **fields,
        warnings=tuple(faults),
    )


def parse_gpano(packet: bytes | str) -> tuple[dict[str, str], list[str]]:
    """Return the GPano properties of an XMP packet, attributes and elements alike, and warnings.

    A property that stands there twice, with two values, is left out.
    """
    if not packet:
        return {}, []
    if len(packet) > _MAX_PACKET:
        return {}, [f"XMP has {len(packet)} bytes, at most {_MAX_PACKET} are read"]
    try:
        parser = ET.XMLParser(target=_NoDoctype())
        parser.feed(packet.strip(b"\0 \n") if isinstance(packet, bytes) else packet)
        root = parser.close()
    except (ET.ParseError, ValueError, LookupError) as error:
        return {}, [f"XMP cannot be read: {error}"]
    values: dict[str, set[str]] = {}
    for element in root.iter():
        for name, value in [(element.tag, element.text), *element.attrib.items()]:
            if isinstance(name, str) and name.startswith(f"{{{NAMESPACE}}}") and value:
                values.setdefault(name.partition("}")[2], set()).add(value.strip())
    double = sorted(name for name, known in values.items() if len(known) > 1)
    single = {name: known.pop() for name, known in values.items() if len(known) == 1}
    return single, [f"XMP {name} has several values" for name in double]


class _NoDoctype(ET.TreeBuilder):
    """Builds a tree, and refuses a document type before its entities are read."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"it has a document type ({name})")


def _read_area(numbers: dict[str, float], faults: list[str]) -> SphereArea | None:
    if not any(name in numbers for name in _AREA):
        return None
    if missing := [name for name in _AREA if name not in numbers]:
        faults.append(f"XMP lacks {', '.join(missing)}: its areas are not used")
        return None
    return SphereArea(*(numbers[name] for name in _AREA))


def _read_exif(image: Image.Image) -> tuple[dict[str, Any], list[str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = image.getexif()
            camera = exif.get_ifd(ExifTags.IFD.Exif)
            position = exif.get_ifd(ExifTags.IFD.GPSInfo)
    except Exception as error:  # noqa: BLE001 (damaged EXIF: Pillow's parser raises what it likes)
        return {}, [f"EXIF cannot be read: {error}"]
    focal = _to_number(camera.get(ExifTags.Base.FocalLengthIn35mmFilm))
    direction = _to_number(position.get(ExifTags.GPS.GPSImgDirection))
    reference = str(position.get(ExifTags.GPS.GPSImgDirectionRef, "T"))
    return {
        "focal_length": focal if focal and focal > 0 else None,  # 0: unknown (EXIF 2.32)
        "direction": None if direction is None else direction % 360,
        "magnetic": reference.upper().startswith("M"),
        "position": _read_position(position),
    }, []


def _read_position(tags: Mapping[int, Any]) -> tuple[float, float] | None:
    """Return latitude and longitude of GPS tags; None where they are none, or impossible."""
    latitude = _to_degrees(tags.get(ExifTags.GPS.GPSLatitude))
    longitude = _to_degrees(tags.get(ExifTags.GPS.GPSLongitude))
    if latitude is None or longitude is None or latitude > 90 or longitude > 180:
        return None
    south = str(tags.get(ExifTags.GPS.GPSLatitudeRef, "N")).upper().startswith("S")
    west = str(tags.get(ExifTags.GPS.GPSLongitudeRef, "E")).upper().startswith("W")
    return (-latitude if south else latitude), (-longitude if west else longitude)


def _to_degrees(angle: object) -> float | None:
    """Return degrees of degrees, minutes and seconds."""
    parts = [_to_number(part) for part in angle] if isinstance(angle, Sequence) else []
    if len(parts) != 3 or any(part is None or part < 0 for part in parts):
        return None
    degrees, minutes, seconds = (part or 0.0 for part in parts)
    return degrees + minutes / 60 + seconds / 3600


def _to_number(value: object) -> float | None:
    """Return a finite number; None for all else, such as a fraction by zero."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType] (whatever a file holds)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return number if math.isfinite(number) else None
