"""Encoded bytes <-> uint8 arrays: the one decoder, resizer and palette decoder of the project.

One decoder, because recall drops when training and search resize with different libraries (issues
of SAFA and CVFT; `PREPROCESS` names the version that checkpoints and indexes record).
"""

import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from cvmatch.data.schema import IGNORE, PALETTE

PREPROCESS = "pillow-bicubic-1"
"""Name of the decoding and resizing below; it changes whenever their pixels change."""

MAX_PIXELS = 64 * 2**20
"""Largest picture that is decoded, in pixels (64 Mi: a 8192 x 8192 tile)."""

WIDEST_OTHER = 2.5
"""Pictures that are less wide for their height are no panoramas of a band: a sphere is 2:1."""

FORMATS = ("PNG", "JPEG")
"""The formats that are decoded: Pillow's others are more code for a hostile file to reach."""

TOLERANCE = 30.0
"""Largest distance (L2 in RGB) of a pixel from its palette colour; beyond it, it is ignored."""


class BadImage(ValueError):
    """A picture that cannot be used; the message says why."""


def open_image(data: bytes) -> Image.Image:
    """Decode a whole RGB or 8-bit grey picture.

    Raises:
        BadImage: empty, truncated, not a picture, more than MAX_PIXELS, or another mode (CMYK,
            16-bit, palette, alpha), which converting would silently distort.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(
                    f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} allowed"
                )
            if image.mode not in ("RGB", "L"):
                raise BadImage(f"mode {image.mode}, expected RGB or L (8-bit)")
            image.load()
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not a PNG or JPEG picture") from None  # Pillow's text holds an address
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    return image


def open_panorama(data: bytes) -> Image.Image:
    """Decode a 360-degree panorama.

    Raises:
        BadImage: as `open_image`; or a picture of another shape, which resizing would squash.
    """
    image = open_image(data)
    if image.width < WIDEST_OTHER * image.height:
        raise BadImage(
            f"{image.width} x {image.height} pixels, expected a 360-degree panorama at least "
            f"{WIDEST_OTHER} times as wide as high (CVUSA: 1232 x 224). Crop a whole sphere (2:1) "
            "to the band that the models were trained on, 65 degrees high"
        )
    return image


def decode(data: bytes, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of a picture, resized (antialiased bicubic) to `size` = (height, width)."""
    image = open_image(data).convert("RGB")
    if size is not None and size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def decode_ids(data: bytes, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a map stored as ids (mode L), resized by nearest neighbour."""
    image = open_image(data)
    if image.mode != "L":
        raise BadImage(f"mode {image.mode}, expected L (a map of class ids)")
    if size is not None and size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(image)


def decode_palette(
    data: bytes, size: tuple[int, int], num_classes: int = 5
) -> UInt8[np.ndarray, "h w"]:
    """Class ids (`classes_of`) of an encoded palette picture, resized by nearest neighbour.

    Raises:
        BadImage: not a picture, or grey: then it is no palette picture.
    """
    image = open_image(data)
    if image.mode != "RGB":
        raise BadImage(f"mode {image.mode}, expected RGB (a map in the palette's colours)")
    near = image.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return classes_of(np.asarray(near), num_classes)


def encode(pixels: UInt8[np.ndarray, "h w ..."], kind: str = "PNG") -> bytes:
    """Encode an RGB picture, or a map of ids (two axes, mode L), as PNG (lossless) or JPEG."""
    buffer = io.BytesIO()
    options = {"compress_level": 1} if kind == "PNG" else {"quality": 92}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def classes_of(
    colours: UInt8[np.ndarray, "h w 3"], num_classes: int = 5
) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a palette picture: the nearest colour within TOLERANCE, else IGNORE.

    The masks of CVUSA's subset are not clean (2,069 colours in one file). Nearest is taken over all
    of PALETTE, so with five classes a car is ignored and not taken for its nearest neighbour.
    """
    palette = np.array(PALETTE, dtype=np.int32)
    distance = ((colours[..., None, :].astype(np.int32) - palette) ** 2).sum(-1)
    ids = distance.argmin(-1).astype(np.uint8)
    ids[(distance.min(-1) > TOLERANCE**2) | (ids >= num_classes)] = IGNORE
    return ids


def colours_of(ids: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Palette picture of a map of class ids; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(PALETTE)] = PALETTE
    return table[ids]
