"""Files of pictures with XMP and EXIF, and spheres as a tilted camera sees them."""

import io
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

ATTRIBUTES = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" {}/>'
    "</rdf:RDF></x:xmpmeta>"
)
ELEMENTS = ATTRIBUTES.replace(" {}/>", ">{}</rdf:Description>")


def xmp_of(form: str = "attributes", **properties: Any) -> bytes:
    """An XMP packet with GPano properties as "attributes" or "elements"."""
    if form == "elements":
        inner = "".join(f"<GPano:{key}>{value}</GPano:{key}>" for key, value in properties.items())
        return ELEMENTS.format(inner).encode()
    inner = " ".join(f'GPano:{key}="{value}"' for key, value in properties.items())
    return ATTRIBUTES.format(inner).encode()


def areas_of(
    full: tuple[int, int], size: tuple[int, int], corner: tuple[int, int]
) -> dict[str, Any]:
    """GPano's properties of a part; each (width, height) or (left, top)."""
    return {
        "ProjectionType": "equirectangular",
        "FullPanoWidthPixels": full[0],
        "FullPanoHeightPixels": full[1],
        "CroppedAreaImageWidthPixels": size[0],
        "CroppedAreaImageHeightPixels": size[1],
        "CroppedAreaLeftPixels": corner[0],
        "CroppedAreaTopPixels": corner[1],
    }


def exif_of(
    orientation: int = 1,
    direction: float | Fraction | None = None,
    reference: str = "T",
    focal_length: int | None = None,
) -> Image.Exif:
    """EXIF as cameras write it."""
    exif = Image.Exif()
    if orientation != 1:
        exif[ExifTags.Base.Orientation] = orientation
    if direction is not None:
        position = exif.get_ifd(ExifTags.IFD.GPSInfo)
        position[ExifTags.GPS.GPSImgDirection] = direction
        position[ExifTags.GPS.GPSImgDirectionRef] = reference
    if focal_length is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal_length
    return exif


def save(
    picture: np.ndarray | Image.Image,
    kind: str = "PNG",
    xmp: bytes = b"",
    exif: Image.Exif | None = None,
    **options: Any,
) -> bytes:
    """Encode a picture with its metadata."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if exif is not None:
        options["exif"] = exif.tobytes()  # of Exif itself, Pillow drops one of IFDs alone
    if xmp and kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = info
    elif xmp:
        options["xmp"] = xmp
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tilt(
    sphere: np.ndarray, heading: float = 0.0, pitch: float = 0.0, roll: float = 0.0
) -> np.ndarray:
    """What a camera with this pose (degrees) takes of a level sphere whose middle looks north.

    The camera is rolled clockwise about where it looks, then pitched up, then turned clockwise.
    """
    height, width = sphere.shape[:2]
    azimuth = ((np.arange(width) + 0.5) / width * 2 - 1) * np.pi
    rise = (0.5 - (np.arange(height) + 0.5) / height)[:, None] * np.pi
    own = np.stack(
        np.broadcast_arrays(
            np.cos(rise) * np.sin(azimuth), np.cos(rise) * np.cos(azimuth), np.sin(rise)
        ),
        axis=-1,
    )
    pose = Rotation.from_euler("ZXY", [-heading, pitch, roll], degrees=True)
    east, north, up = pose.apply(own.reshape(-1, 3)).T
    row = (0.5 - np.arcsin(up.clip(-1, 1)) / np.pi) * height - 0.5
    column = (np.arctan2(east, north) / (2 * np.pi) + 0.5) * width - 0.5
    padded = np.pad(sphere, ((0, 0), (2, 2), (0, 0)), "wrap")
    layers = [
        map_coordinates(
            padded[..., layer].astype(float), [row, column + 2], order=1, mode="nearest"
        )
        for layer in range(3)
    ]
    taken = np.stack(layers, axis=-1).reshape(sphere.shape)
    return taken.round().clip(0, 255).astype(np.uint8)


def look(sphere: np.ndarray, size: tuple[int, int], fov: float, heading: float) -> np.ndarray:
    """What a level pinhole camera takes of a sphere; `size` is (height, width)."""
    height, width = size
    focal = width / 2 / np.tan(np.radians(fov) / 2)
    right = (np.arange(width) + 0.5 - width / 2) / focal
    up = (height / 2 - np.arange(height) - 0.5)[:, None] / focal
    azimuth = np.broadcast_to(np.arctan(right), (height, width)) + np.radians(heading)
    rise = np.arctan(up / np.hypot(1, right))
    row = (0.5 - rise / np.pi) * sphere.shape[0] - 0.5
    column = (azimuth / (2 * np.pi) + 0.5) * sphere.shape[1] - 0.5
    layers = [
        map_coordinates(
            sphere[..., layer].astype(float),
            [row, column % sphere.shape[1]],
            order=1,
            mode="nearest",
        )
        for layer in range(3)
    ]
    return np.stack(layers, axis=-1).round().clip(0, 255).astype(np.uint8)
