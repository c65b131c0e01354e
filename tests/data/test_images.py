import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cvmatch.data.images import (
    MAX_PIXELS,
    TOLERANCE,
    BadImage,
    classes_of,
    colours_of,
    decode,
    decode_ids,
    encode,
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
        (b"<html>404</html>", "not a PNG or JPEG"),
        (saved(Image.new("RGB", (4, 4)), "TIFF"), "not a PNG or JPEG"),
        (saved(Image.new("RGB", (4, 4)), "GIF"), "not a PNG or JPEG"),
        (saved(Image.new("CMYK", (4, 4)), "JPEG"), "mode CMYK, expected RGB or L"),
        (saved(Image.new("I;16", (4, 4))), "mode I;16, expected"),
        (saved(Image.new("RGB", (4, 4)).convert("P")), "mode P, expected"),
        (saved(Image.new("RGBA", (4, 4))), "mode RGBA, expected"),
        (saved(Image.new("1", (4, 4))), "mode 1, expected"),
        (claiming(100_000, 100_000), "10000000000 pixels"),
        (claiming(10_000, 10_000), "10000 x 10000 pixels, at most"),
        (encode(noise(4, 4, 3))[:20], "cannot be decoded"),
    ],
    ids=[
        *("empty", "html", "tiff", "gif", "cmyk", "16-bit"),
        *("palette", "alpha", "1-bit", "bomb", "large", "header"),
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
