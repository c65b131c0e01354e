import io
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cvmatch.data.images import (
    LINEAR_EXACT,
    MAX_PIXELS,
    TOLERANCE,
    BadImage,
    check_palette,
    classes_of,
    colours_of,
    decode,
    decode_ids,
    decode_palette,
    encode,
    is_picture,
    open_image,
)
from cvmatch.data.schema import IGNORE, LABELS, PALETTE


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header, checksum and all, claims a size."""
    data = bytearray(encode(noise(4, 4, 3)))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def one(colour, num_classes: int = 5) -> int:
    return int(classes_of(np.array([[colour]], dtype=np.uint8), num_classes)[0, 0])


@pytest.mark.parametrize(
    ("colour", "label"),
    [
        ((255, 255, 255), "impervious"),
        ((255, 0, 0), "clutter"),
        ((0, 255, 0), "tree"),
        ((0, 0, 255), "building"),
        ((0, 255, 255), "low vegetation"),
    ],
)
def test_classes_of_isprs_colour_is_its_class(colour, label):
    assert LABELS[one(colour)] == label
    assert one(colour, 6) == one(colour)


def test_classes_of_yellow_is_a_car_only_where_there_are_six_classes():
    assert one((255, 255, 0), 5) == IGNORE
    assert LABELS[one((255, 255, 0), 6)] == "car"


@pytest.mark.parametrize("colour", [(0, 0, 0), (128, 128, 128), (128, 128, 255), (128, 255, 128)])
def test_classes_of_blend_of_two_colours_is_ignored_and_not_class_0(colour):
    # The seed's encode_segmentation gave class 0 to every colour that it did not know.
    assert one(colour) == IGNORE


def test_classes_of_impure_mask_loses_no_pixel_to_class_0():
    """Blue and green halves, resized as the published masks were: the seam is not white."""
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, :32], picture[:, 32:] = PALETTE[3], PALETTE[2]
    small = Image.fromarray(picture).resize((37, 37), Image.Resampling.BICUBIC)
    ids = classes_of(np.asarray(small))
    assert set(np.unique(ids)) == {2, 3, IGNORE}
    assert (ids[:, :17] == 3).all()
    assert (ids[:, 20:] == 2).all()


@settings(deadline=None, max_examples=100)
@given(st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from([5, 6]))
def test_classes_of_any_colour_is_the_nearest_within_tolerance_else_ignored(colour, num_classes):
    distance = [sum((a - b) ** 2 for a, b in zip(colour, other, strict=True)) for other in PALETTE]
    nearest = min(range(len(PALETTE)), key=distance.__getitem__)
    inside = distance[nearest] <= TOLERANCE**2 and nearest < num_classes
    assert one(colour, num_classes) == (nearest if inside else IGNORE)


def test_classes_of_colours_of_gives_the_ids_back():
    ids = np.array([[0, 1, 2], [3, 4, 5], [IGNORE, 0, IGNORE]], dtype=np.uint8)
    assert np.array_equal(classes_of(colours_of(ids), 6), ids)


def test_encode_png_keeps_every_pixel_and_every_id():
    pixels, ids = noise(9, 7, 3), noise(9, 7)
    assert np.array_equal(decode(encode(pixels)), pixels)
    assert np.array_equal(decode_ids(encode(ids)), ids)


def test_decode_size_is_height_then_width_and_antialiased():
    stripes = np.zeros((32, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # nearest neighbour would keep 0 or 255; a mean is near 128
    small = decode(encode(stripes), (8, 16))
    assert small.shape == (8, 16, 3)
    assert 100 < small[:, 2:-2].min() <= small[:, 2:-2].max() < 155


def test_decode_linear_exact_gives_the_pixels_of_opencv():
    # By cv2.resize(..., (3, 3), interpolation=cv2.INTER_LINEAR_EXACT) of opencv-python 5.0.0.
    pixels = (np.arange(24).reshape(2, 4, 3) * 37 % 256).astype(np.uint8)
    expected = [
        [[19, 56, 93], [167, 76, 113], [101, 95, 132]],
        [[91, 128, 59], [133, 106, 143], [67, 83, 120]],
        [[164, 201, 25], [99, 136, 173], [33, 70, 107]],
    ]
    assert decode(encode(pixels), (3, 3), LINEAR_EXACT).tolist() == expected


@pytest.mark.parametrize("size", [(3, 4), (9, 4), (20, 21), (40, 64)])
def test_decode_linear_exact_is_linear_between_pixel_centres(size):
    pixels = noise(20, 33, 3)
    resized = decode(encode(pixels), size, LINEAR_EXACT).astype(np.int64)
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double()
    linear = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=False)
    assert np.abs(resized - linear[0].permute(1, 2, 0).numpy()).max() < 2  # it counts in 256ths
    flat = np.full((20, 33, 3), 255, np.uint8)
    assert (decode(encode(flat), size, LINEAR_EXACT) == 255).all()


def test_decode_grey_picture_has_three_equal_channels():
    grey = noise(5, 6)
    assert np.array_equal(decode(encode(grey)), np.stack([grey] * 3, axis=-1))


def test_decode_ids_resized_invents_no_class():
    ids = np.zeros((20, 20), dtype=np.uint8)
    ids[:, 10:] = 4
    ids[5] = IGNORE
    small = decode_ids(encode(ids), (7, 13))
    assert small.shape == (7, 13)
    assert set(np.unique(small)) <= {0, 4, IGNORE}


def test_decode_ids_colour_picture_is_refused():
    with pytest.raises(BadImage, match="mode RGB, expected L"):
        decode_ids(encode(noise(4, 4, 3)))
    with pytest.raises(BadImage, match="mode P, expected L"):
        decode_ids(saved(Image.fromarray(colours_of(IDS)).quantize(6)))


IDS = np.arange(36, dtype=np.uint8).reshape(6, 6) % 6


def palette_picture(entries: np.ndarray, colours) -> Image.Image:
    image = Image.fromarray(entries).convert("P")
    image.putdata(entries.ravel())
    image.putpalette(np.array(colours, np.uint8).ravel().tolist())
    return image


def with_alpha(pixels: np.ndarray, alpha: int = 255, clear: int = 0) -> Image.Image:
    layer = np.full(pixels.shape[:2], alpha, np.uint8)
    layer[:clear] = 0
    return Image.fromarray(np.dstack([pixels, layer]))


def test_decode_ids_packed_into_a_palette_of_greys_are_the_levels():
    backwards = [(level,) * 3 for level in (9, 7, 5, 3, 1, 0)]
    levels = np.array([9, 7, 5, 3, 1, 0], np.uint8)[IDS]
    assert np.array_equal(decode_ids(saved(palette_picture(IDS, backwards))), levels)
    opaque = np.dstack([levels, np.full_like(levels, 255)])
    assert np.array_equal(decode_ids(saved(Image.fromarray(opaque))), levels)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(colours_of(IDS)),
        with_alpha(colours_of(IDS)),
        palette_picture(5 - IDS, PALETTE[::-1]),  # the colours say it, not the entries' numbers
        palette_picture(IDS, [(40 * n, 90, 10 * n) for n in range(6)]),  # as Pascal VOC's are
        Image.fromarray(IDS),
        Image.fromarray(np.dstack([IDS, np.full_like(IDS, 255)])),
    ],
    ids=["RGB", "RGBA", "palette in the classes' colours", "palette of ids", "ids", "ids, alpha"],
)
def test_decode_palette_reads_a_map_however_it_is_stored(image):
    check_palette(saved(image))
    assert np.array_equal(decode_palette(saved(image), num_classes=6), IDS)
    five = np.where(IDS == 5, IGNORE, IDS)
    assert np.array_equal(decode_palette(saved(image), (6, 6)), five)


@pytest.mark.parametrize("levels", [[0], [0, 255], [3, 17], [1, 128]])
def test_decode_palette_grey_that_may_be_colours_is_refused(levels):
    image = Image.fromarray(np.array(levels * 4, np.uint8)[None])
    for read in (check_palette, decode_palette):
        with pytest.raises(BadImage, match=r"mode L, expected RGB .*or class ids from 0 to 5"):
            read(saved(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_open_image_truncated_file_is_refused(kind, share):
    data = encode(noise(64, 64, 3), kind)
    assert open_image(data).size == (64, 64)
    with pytest.raises(BadImage, match="cannot be decoded"):
        open_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not a PNG, JPEG, WebP or HEIC"),
        (saved(Image.new("RGB", (4, 4)), "TIFF"), "not a PNG, JPEG"),
        (saved(Image.new("RGB", (4, 4)), "GIF"), "not a PNG, JPEG"),
        (saved(Image.new("I;16", (4, 4), 4095)), "16 bits with levels 4095 to 4095, expected"),
        (saved(Image.new("RGBA", (4, 4), (9, 9, 9, 254))), "100.0% of its pixels are transparent"),
        (saved(with_alpha(noise(4, 4, 3), clear=1)), "25.0% of its pixels are transparent"),
        (saved(Image.new("LA", (4, 4))), "transparent"),
        (saved(Image.new("P", (4, 4)), transparency=0), "transparent"),
        (saved(Image.new("RGB", (4, 4)), transparency=(0, 0, 0)), "transparent"),
        (claiming(100_000, 100_000), "10000000000 pixels"),
        (claiming(10_000, 10_000), "10000 x 10000 pixels, at most"),
        (encode(noise(4, 4, 3))[:20], "cannot be decoded"),
    ],
    ids=[
        *("empty", "html", "tiff", "gif", "dark 16-bit", "alpha 254", "hole", "grey alpha"),
        *("palette hole", "colour key", "bomb", "large", "header"),
    ],
)
def test_open_image_unusable_file_is_refused_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        open_image(data)


def test_open_image_size_limit_is_checked_before_any_pixel_is_decoded():
    side = int(MAX_PIXELS**0.5)
    with pytest.raises(BadImage, match="cannot be decoded"):  # the size is allowed, the data short
        open_image(claiming(side, side))
    with pytest.raises(BadImage, match="at most"):
        open_image(claiming(side, side + 1))


GREY = noise(6, 10)
COLOUR = noise(6, 10, 3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (with_alpha(COLOUR), COLOUR),
        (Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)])), GREY),
        (palette_picture(GREY, COLOUR.repeat(5, 0).reshape(-1, 3)[:256]), None),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.fromarray(np.where(GREY > 99, 255, 0).astype(np.uint8)).convert("1"), None),
    ],
    ids=["RGBA", "LA", "palette", "16-bit grey", "1-bit"],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode_way_of_storing_colours_does_not_matter(image, expected, kind):
    if kind == "WEBP":
        image = image.convert("RGBA" if image.mode.endswith("A") else "RGB")
    if expected is None or kind == "WEBP":
        expected = np.asarray(image.convert("RGB"))
    if expected.ndim == 2:
        expected = np.stack([expected] * 3, axis=-1)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(saved(image, kind, **options)), expected)


def test_decode_cmyk_is_near_the_colours_it_was_made_of():
    colours = Image.fromarray(np.full((16, 16, 3), (200, 120, 40), np.uint8))
    got = decode(saved(colours.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(got.astype(int) - (200, 120, 40)).max() < 4


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),  # stored with its top at the right
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}
"""EXIF 2.32, tag 274: which stored edge is the picture's top, and which its left."""


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_decode_turns_a_picture_upright_as_exif_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(8, 16, 3).repeat(8, 0).repeat(8, 1)
    data = saved(Image.fromarray(stored), kind, exif=exif)
    plain = decode(saved(Image.fromarray(stored), kind))
    assert np.array_equal(decode(data), UPRIGHT.get(orientation, UPRIGHT[1])(plain))


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=60))
def test_decode_damaged_exif_is_no_reason_to_refuse(junk):
    pixels = noise(4, 4, 3)
    whole = saved(Image.fromarray(pixels), exif=b"Exif\0\0" + junk)
    assert sorted(decode(whole).ravel()) == sorted(pixels.ravel())


def test_is_picture_knows_the_endings_in_any_case():
    names = ["a.jpg", "a.JPG", "a.Jpeg", "a.jpe", "a.JFIF", "a.png", "a.WebP", "a.heic", "a.HEIF"]
    assert all(is_picture(name) for name in names)
    assert not any(is_picture(name) for name in ["jpg", "a.jpg.txt", "a.tif", "a"])


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_without_the_extra_is_refused_with_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImage, match=r"pip install cvmatch\[heic\]"):
        open_image(HEIC)


def test_heic_is_read_where_the_extra_is_installed():
    heif = pytest.importorskip("pillow_heif")
    pixels = noise(8, 8, 3).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=95)
    assert np.abs(decode(buffer.getvalue()).astype(int) - pixels).mean() < 12
    with pytest.raises(BadImage, match=r"cannot be decoded|not a PNG"):
        open_image(buffer.getvalue()[:200])


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_open_image_damaged_bytes_decode_or_raise_bad_image(data):
    whole = encode(noise(24, 32, 3), data.draw(st.sampled_from(["PNG", "JPEG"])))
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, len(whole)), max_size=5)):
        if place < len(damaged):
            damaged[place] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(damaged))
    except BadImage:
        return
    assert image.mode in ("RGB", "L")
    assert np.asarray(image).shape[:2] == (image.height, image.width)
