"""Encoded bytes <-> uint8 arrays: the one decoder, resizer and palette decoder of the project.

One decoder, because recall drops when training and search resize with different libraries (issues
of SAFA and CVFT): checkpoints and indexes record which of `PREPROCESSINGS` they need. A picture is
what a viewer shows: EXIF's orientation is applied, and how a file stores its colours (palette,
opaque alpha, CMYK, 16-bit grey) does not matter, or the picture is refused with the reason.
"""

import importlib
import io
import warnings

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from cvmatch.data.schema import IGNORE, PALETTE

PREPROCESS = "pillow-bicubic-2"
"""Name of the decoding below and of its resizing; it changes whenever their pixels change."""

LINEAR_EXACT = "pillow-linear-exact-2"
"""Name of the same decoding with the resizing that Sample4Geo's weights were trained with: OpenCV's
INTER_LINEAR_EXACT, which reads two pixels a side and so does not smooth what it makes smaller."""

MAX_PIXELS = 64 * 2**20
"""Largest picture of a row that is decoded, in pixels (64 Mi: a 8192 x 8192 tile)."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats that are decoded: Pillow's others are more code for a hostile file to reach. HEIC is
decoded too where the extra `cvmatch[heic]` is installed."""

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif")
"""How names of pictures end, in lower case."""

TOLERANCE = 30.0
"""Largest distance (L2 in RGB) of a pixel from its palette colour; beyond it, it is ignored."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_WORD = 257  # 65,535 / 255: what a level of 8 bits is in 16
_ONE = 256  # a whole weight of `_resize_linear`
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """A picture that cannot be used; the message says why."""


class TooLarge(BadImage):
    """A picture of more pixels than are decoded."""


def is_picture(name: str) -> bool:
    """Whether a file's name ends as those of pictures do, in capitals or not."""
    return name.lower().endswith(ENDINGS)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a whole picture, upright, in mode RGB or L (8-bit grey).

    Raises:
        BadImage: empty, truncated, not a picture, more than `max_pixels`, or of a mode that
            converting would distort (transparent pixels, dark 16-bit grey).
    """
    return load_image(read_header(data, max_pixels))


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture without decoding it: size and mode as stored, and its metadata.

    Raises:
        BadImage: empty, not a picture, or more than `max_pixels`.
    """
    if not data:
        raise BadImage("empty file")
    formats = [*FORMATS, *_heif_formats(data)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which is checked below, and of EXIF
            image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # Pillow's text holds an address.
        raise BadImage("not a PNG, JPEG, WebP or HEIC picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    if image.width * image.height > max_pixels:
        raise TooLarge(f"{image.width} x {image.height} pixels, at most {max_pixels} allowed")
    return image


def load_image(image: Image.Image) -> Image.Image:
    """Decode what `read_header` opened, upright, in mode RGB or L.

    Raises:
        BadImage: as `open_image`.
    """
    return _flatten(_load(image))


def read_orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 (upright) to 8; 1 where there is none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 (damaged EXIF: Pillow's parser raises what it likes)
        return 1
    return orientation if orientation in range(2, 9) else 1


def decode(
    data: bytes, size: tuple[int, int] | None = None, preprocess: str = PREPROCESS
) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of a picture, resized to `size` = (height, width) as `preprocess` names it."""
    image = open_image(data).convert("RGB")
    if size is not None and size != (image.height, image.width):
        return _RESIZERS[preprocess](image, size)
    return np.asarray(image)


def decode_ids(data: bytes, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a map stored as ids, resized by nearest neighbour.

    Grey levels are ids. A palette of greys is another way to store them; one of colours is not.

    Raises:
        BadImage: not a picture, or coloured.
    """
    image = _load(read_header(data))
    mode = image.mode
    flat = _flatten(image)
    if flat.mode == "RGB" and mode == "P" and _is_grey(image):
        flat = flat.getchannel(0)
    if flat.mode != "L":
        raise BadImage(f"mode {mode}, expected L (a map of class ids)")
    return np.asarray(_nearest(flat, size))


def decode_palette(
    data: bytes, size: tuple[int, int] | None = None, num_classes: int = 5
) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a map in the palette's colours (`classes_of`), resized by nearest neighbour.

    A map of ids is read too: grey levels, or the entries of a palette of other colours, of which
    each is the id of a class or IGNORE.

    Raises:
        BadImage: not a picture; or grey, and not certainly ids.
    """
    image = _load(read_header(data))
    ids = _read_entries(image)
    if ids is None:
        return classes_of(np.asarray(_nearest(_flatten(image), size)), num_classes)
    numbers = np.array(_nearest(ids, size))
    numbers[numbers >= num_classes] = IGNORE
    return numbers


def check_palette(data: bytes) -> None:
    """Check that `decode_palette` reads a map.

    Raises:
        BadImage: it does not.
    """
    image = _load(read_header(data))
    if _read_entries(image) is None:
        _flatten(image)


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


def _heif_formats(data: bytes) -> list[str]:
    """Return Pillow's name of HEIC for such a picture, with its plugin in place."""
    if data[4:8] != b"ftyp" or data[8:12] not in _HEIF_BRANDS:
        return []
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise BadImage(
            "a HEIC picture, which needs the extra: `pip install cvmatch[heic]`, or convert it to "
            f"JPEG ({error})"
        ) from error
    return ["HEIF"]


def _load(image: Image.Image) -> Image.Image:
    """Decode an opened picture, upright, in the mode in which it is stored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    turn = _TURNS.get(read_orientation(image))
    return image if turn is None else image.transpose(turn)


def _flatten(image: Image.Image) -> Image.Image:
    """Convert a decoded picture to RGB or L.

    Colours of CMYK are by the plain formula, without a profile; 16-bit grey is rounded to 8.
    """
    try:
        if "A" in image.getbands() or "transparency" in image.info:
            return _drop_alpha(image)
        if image.mode in ("RGB", "L"):
            return image
        if image.mode == "1":
            return image.convert("L")
        if image.mode in ("P", "CMYK", "YCbCr"):
            return image.convert("RGB")
        if image.mode.startswith("I"):
            return _narrow(image)
    except (OSError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"mode {image.mode} cannot be converted: {error}") from error
    raise BadImage(f"mode {image.mode}, expected a mode that converts to RGB or L (8-bit)")


def _drop_alpha(image: Image.Image) -> Image.Image:
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    if (clear := float((alpha < 255).mean())) > 0:
        raise BadImage(
            f"{clear:.1%} of its pixels are transparent: what is behind them is not known. Fill "
            "them, or save it without transparency"
        )
    return image.convert("L" if image.mode in ("L", "LA") else "RGB")


def _narrow(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits, where it is a picture of the whole range."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535 or levels.max() < 2**14:
        raise BadImage(
            f"grey of 16 bits with levels {levels.min()} to {levels.max()}, expected a range up to "
            "65535, at least 16384: in 8 bits nothing would be seen. Scale it, or save it as RGB"
        )
    return Image.fromarray(((levels + _WORD // 2) // _WORD).astype(np.uint8))


def _resize_bicubic(image: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Resize by Pillow's bicubic kernel, which widens (antialiases) where it makes smaller."""
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _resize_linear(image: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Resize as OpenCV's INTER_LINEAR_EXACT, to the bit: in whole 256ths, first along rows."""
    pixels = np.asarray(image)
    top, bottom, down = _linear_taps(pixels.shape[0], size[0])
    left, right, along = _linear_taps(pixels.shape[1], size[1])
    along = along.astype(np.uint16)[:, None]
    rows = pixels.take(left, axis=1).astype(np.uint16) * (_ONE - along)
    rows += pixels.take(right, axis=1).astype(np.uint16) * along
    down = down.astype(np.uint32)[:, None, None]
    mixed = rows.take(top, axis=0) * (_ONE - down) + rows.take(bottom, axis=0) * down
    return ((mixed + _ONE**2 // 2) // _ONE**2).astype(np.uint8)


def _linear_taps(
    length: int, wanted: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Return the two pixels that each of `wanted` lies between, and the second's 256ths."""
    at = (np.arange(wanted) + 0.5) * (length / wanted) - 0.5
    first = np.floor(at).astype(np.int64)
    second = np.rint((at - first) * _ONE).astype(np.int64)
    return first.clip(0, length - 1), (first + 1).clip(0, length - 1), second


_RESIZERS = {PREPROCESS: _resize_bicubic, LINEAR_EXACT: _resize_linear}

PREPROCESSINGS = tuple(_RESIZERS)
"""Names of all ways to decode and resize that this version knows."""


def _nearest(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if size is None or size == (image.height, image.width):
        return image
    return image.resize((size[1], size[0]), Image.Resampling.NEAREST)


def _palette(image: Image.Image) -> UInt8[np.ndarray, "entry 3"]:
    """Return the colours of the palette's entries that a picture of mode P uses."""
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    used = [index for index, count in enumerate(image.histogram()) if count]
    return colours[[index for index in used if index < len(colours)]]


def _is_grey(image: Image.Image) -> bool:
    colours = _palette(image)
    return bool((colours == colours[:, :1]).all())


def _read_entries(image: Image.Image) -> Image.Image | None:
    """Return the ids that a map is stored as (mode L); None where its colours say the classes.

    Raises:
        BadImage: a grey map that may be ids or colours.
    """
    if image.mode == "P":
        _flatten(image)  # which refuses transparent pixels
        entries = Image.fromarray(np.asarray(image))
        black = (_palette(image) == 0).all(axis=1)
        named = classes_of(_palette(image)[None], len(PALETTE))[0] != IGNORE
        return entries if not (named | black).all() and _are_ids(entries) else None
    if image.mode not in ("L", "LA", "1", "I;16"):
        return None
    flat = _flatten(image)
    if not _are_ids(flat):
        raise BadImage(
            f"mode {image.mode}, expected RGB (a map in the palette's colours), or class ids from "
            f"0 to {len(PALETTE) - 1} ({IGNORE}: ignored), of which some are above 0"
        )
    return flat


def _are_ids(entries: Image.Image) -> bool:
    """Whether all are ids; not if they may as well be black and white, which are colours."""
    used = {level for level, count in enumerate(entries.histogram()) if count}
    classes = set(range(len(PALETTE)))
    return used <= classes | {IGNORE} and bool(used & classes - {0})
