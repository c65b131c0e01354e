import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvmatch.data import images
from cvmatch.data.images import BadImage, decode, encode
from cvmatch.data.photos import band
from cvmatch.data.photos.reading import Photo, read_photo
from cvmatch.data.settings import PhotoSettings
from cvmatch.nn.backbones import MEAN
from cvmatch.nn.geometry import GROUND_FOV
from tests.helpers.photo import areas_of, exif_of, look, save, tilt, xmp_of

WIDTH, HEIGHT = 352, 176  # of a sphere, whose middle 64 rows are the band
EDGE = (HEIGHT - 64) // 2
FILL = np.round(255 * np.array(MEAN))


def make_sphere() -> np.ndarray:
    """Smooth colours that tell every direction from every other; the edges meet."""
    azimuth = ((np.arange(WIDTH) + 0.5) / WIDTH * 2 - 1) * math.pi
    rise = (0.5 - (np.arange(HEIGHT) + 0.5) / HEIGHT)[:, None] * math.pi
    layers = [
        np.cos(rise) * np.sin(azimuth),
        np.cos(rise) * np.cos(azimuth),
        np.sin(rise) + 0 * azimuth,
    ]
    rough = np.sin(12 * azimuth) * np.cos(9 * rise)
    return np.stack([127 + 90 * one + 30 * rough for one in layers], -1).round().astype(np.uint8)


SPHERE = make_sphere()
BAND = SPHERE[EDGE:-EDGE]
GPANO = {"ProjectionType": "equirectangular"}


def turned(pixels: np.ndarray, heading: float) -> np.ndarray:
    """What is taken when the middle looks along `heading` (whole columns)."""
    return np.roll(pixels, -round(heading / 360 * pixels.shape[1]), axis=1)


def difference(got: Photo, expected: np.ndarray) -> float:
    pixels = decode(got.data).astype(float)
    assert pixels.shape == expected.shape
    return float(np.abs(pixels - expected).mean())


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_read_photo_band_is_the_files_own_bytes(kind):
    data = save(BAND, kind)
    read = read_photo(data)
    assert read.data == data
    assert read.read.heading_source == "assumed"
    assert str(read.read) == "band 352 x 64, north assumed in the middle"


def test_read_photo_whole_sphere_is_cut_to_the_band():
    got = read_photo(save(SPHERE))
    assert difference(got, BAND) == 0
    assert (got.read.projection, got.read.projection_source) == ("sphere", "shape")
    got = read_photo(save(SPHERE, xmp=xmp_of(**GPANO)))
    assert difference(got, BAND) == 0
    assert str(got.read) == "sphere 352 x 176 (by its XMP), north assumed in the middle"


def test_read_photo_larger_sphere_becomes_a_band_of_the_usual_size():
    large = Image.fromarray(SPHERE).resize((2816, 1408), Image.Resampling.BICUBIC)
    expected = np.asarray(large.resize((1232, 616), Image.Resampling.BICUBIC))[196:420]
    for kind in ("PNG", "JPEG"):
        assert difference(read_photo(save(large, kind)), expected) < 1.5


@pytest.mark.parametrize(
    ("corner", "size"),
    [((0, 0), (352, 176)), ((0, 20), (352, 120)), ((0, EDGE), (352, 64)), ((100, 30), (352, 110))],
    ids=["whole", "cut above and below", "the band", "another first column"],
)
@pytest.mark.parametrize("resized", [1, 2])
def test_read_photo_part_of_a_sphere_is_cut_to_the_same_band(corner, size, resized):
    part = turned(SPHERE, corner[0] / WIDTH * 360)[corner[1] : corner[1] + size[1]]
    image = Image.fromarray(part).resize((size[0] * resized, size[1] * resized))
    xmp = xmp_of(**areas_of((WIDTH, HEIGHT), size, corner))
    got = read_photo(save(image, xmp=xmp))
    expected = BAND
    if resized > 1:
        expected = np.asarray(Image.fromarray(SPHERE).resize((704, 352)))[112:240]
    assert difference(got, expected) < 1
    assert got.read.covered == 1


def test_read_photo_what_a_part_does_not_show_is_filled_and_said():
    part = SPHERE[70:, 88:264]  # half a turn around north, little above the horizon
    got = read_photo(save(part, xmp=xmp_of(**areas_of((352, 176), (176, 106), (88, 70)))))
    pixels = decode(got.data)
    assert np.abs(pixels[16:, 90:262].astype(float) - BAND[16:, 90:262]).mean() < 2
    for filled in (pixels[:12], pixels[:, :86], pixels[:, 266:]):
        assert (filled == FILL).all()
    assert got.read.fov == pytest.approx(180)
    shown = (64 - 14) * 176 / (64 * 352)
    assert got.read.covered == pytest.approx(shown, abs=0.01)
    assert f"{1 - shown:.0%} of the band filled" in str(got.read)


@pytest.mark.parametrize("heading", [90.0, 225.0, 359.0])
@pytest.mark.parametrize("shape", ["band", "sphere"])
@pytest.mark.parametrize("source", ["flag", "XMP", "EXIF"])
def test_read_photo_north_comes_to_the_middle_whoever_says_the_heading(heading, shape, source):
    taken = turned(BAND if shape == "band" else SPHERE, heading)
    about = {
        "flag": {},
        "XMP": {"xmp": xmp_of(PoseHeadingDegrees=heading)},
        "EXIF": {"exif": exif_of(direction=heading)},
    }[source]
    settings = PhotoSettings(heading=heading if source == "flag" else None)
    got = read_photo(save(taken, **about), settings)
    assert difference(got, BAND) == 0
    assert (got.read.heading, got.read.heading_source) == (heading, source)


def test_read_photo_flag_goes_before_xmp_and_xmp_before_exif():
    data = save(turned(SPHERE, 90), xmp=xmp_of(PoseHeadingDegrees=90), exif=exif_of(direction=180))
    got = read_photo(data)
    assert difference(got, BAND) == 0
    assert "EXIF says another heading, 180.0: XMP's is taken" in str(got.read)
    flagged = read_photo(data, PhotoSettings(heading=0.0))
    assert difference(flagged, turned(BAND, 90)) == 0
    assert flagged.read.warnings == ()
    agreeing = save(SPHERE, xmp=xmp_of(PoseHeadingDegrees=2), exif=exif_of(direction=358))
    assert read_photo(agreeing).read.warnings == ()


def test_read_photo_magnetic_north_is_said():
    got = read_photo(save(BAND, exif=exif_of(direction=45, reference="M")))
    assert "heading 45.0 (EXIF, magnetic north)" in str(got.read)


@pytest.mark.parametrize(
    ("heading", "pitch", "roll"), [(0, 8, 0), (0, 0, 8), (0, -10, 5), (137, 6, -9), (300, -4, 10)]
)
def test_read_photo_tilt_is_undone(heading, pitch, roll):
    pose = {"PoseHeadingDegrees": heading, "PosePitchDegrees": pitch, "PoseRollDegrees": roll}
    data = save(tilt(SPHERE, heading, pitch, roll), xmp=xmp_of(**GPANO, **pose))
    got = read_photo(data)
    assert difference(got, BAND) < 2
    assert difference(read_photo(save(tilt(SPHERE, heading, pitch, roll))), BAND) > 5
    assert f"level mended by {0 - pitch:.1f} / {0 - roll:.1f} degrees" in str(got.read)


@pytest.mark.parametrize(("pitch", "roll"), [(9, 0), (0, 9), (-7, 0), (0, -7)])
def test_read_photo_signs_of_a_tilt_are_those_of_the_specification(pitch, roll):
    """Drawn from its words: pitch is how far above the horizon the middle looks, so that the
    horizon ahead lies below the middle; as roll grows, it turns counter-clockwise: up at the
    right."""
    azimuth = ((np.arange(WIDTH) + 0.5) / WIDTH * 2 - 1) * math.pi
    rise = (0.5 - (np.arange(HEIGHT) + 0.5) / HEIGHT)[:, None] * math.pi
    right, ahead = np.sin(azimuth), np.cos(azimuth)
    slope = right * math.tan(math.radians(roll)) - ahead * math.tan(math.radians(pitch))
    sky = np.tan(rise) > slope
    picture = np.where(sky[..., None], np.uint8(200), np.uint8(50)).repeat(3, axis=-1)
    pose = {"PosePitchDegrees": pitch, "PoseRollDegrees": roll}
    band = decode(read_photo(save(picture, xmp=xmp_of(**GPANO, **pose))).data)
    assert (band[:30] == 200).all()
    assert (band[-30:] == 50).all()


def test_read_photo_tilted_band_lacks_what_it_did_not_show():
    got = read_photo(save(BAND, xmp=xmp_of(PosePitchDegrees=10)))
    assert 0.8 < got.read.covered < 0.95
    assert "level mended by -10.0 / 0.0" in str(got.read)


@pytest.mark.parametrize("heading", [0.0, 130.0])
def test_read_photo_ordinary_photo_is_placed_where_it_looks(heading):
    taken = look(SPHERE, (300, 400), 75, heading)
    got = read_photo(save(taken), PhotoSettings(heading=heading, fov=75.0))
    north = Image.fromarray(SPHERE).resize((1232, 616), Image.Resampling.BICUBIC)
    band, pixels = np.asarray(north)[196:420], decode(got.data)
    middle = round(1232 * (0.5 + heading / 360)) % 1232
    part = slice(middle - 100, middle + 100)  # 58 degrees
    assert np.abs(pixels[40:184, part].astype(float) - band[40:184, part]).mean() < 3
    half = round(1232 * 75 / 720) + 2
    rest = np.r_[0 : middle - half, middle + half : 1232]
    assert (pixels[:, rest] == FILL).all()
    assert "photo 400 x 300 (by --fov), 75.0 degrees wide" in str(got.read)


@pytest.mark.parametrize(("size", "expected"), [((300, 400), 67.3), ((400, 300), 53.1)])
def test_read_photo_focal_length_is_of_the_films_diagonal(size, expected):
    """26 mm on a diagonal of 43.27 mm; 4:3 has 4/5 of it as its width, 3:4 has 3/5."""
    got = read_photo(save(look(SPHERE, size, 70, 0), exif=exif_of(focal_length=26, direction=10)))
    assert got.read.fov == pytest.approx(expected, abs=0.1)
    assert (got.read.projection_source, got.read.heading) == ("EXIF", 10)


def test_read_photo_wide_picture_with_fov_is_part_of_a_turn():
    part = BAND[:, 88:264]
    got = read_photo(save(part), PhotoSettings(fov=180.0))
    pixels = decode(got.data)
    assert np.abs(pixels[2:-2, 92:260].astype(float) - BAND[2:-2, 92:260]).mean() < 2
    assert got.read.projection == "part of a sphere"


@pytest.mark.parametrize(
    ("picture", "about", "reason"),
    [
        (SPHERE[:100, :133], {}, r"133 x 100 pixels, no panorama .* with --fov"),
        (SPHERE[:100, :133], {"xmp": xmp_of(**GPANO)}, "with --fov"),
        (SPHERE[60:110, 20:120], {}, r"100 x 50 .* edges do not meet.*--fov"),
        (SPHERE, {"xmp": xmp_of(ProjectionType="cylindrical")}, "cylindrical, expected equirect"),
        (
            SPHERE[:40],
            {"xmp": xmp_of(**areas_of((352, 176), (352, 40), (0, 0)))},
            "show 0.0% of the trained band",
        ),
    ],
    ids=["photo", "no area that fits", "2:1, no sphere", "cylinder", "sky alone"],
)
def test_read_photo_what_cannot_be_placed_is_refused_with_the_reason(picture, about, reason):
    with pytest.raises(BadImage, match=reason):
        read_photo(save(picture, **about))


@pytest.mark.parametrize(
    ("areas", "fault"),
    [
        (areas_of((352, 176), (352, 120), (0, 28)), "352 x 120 of a picture of 352 x 176"),
        (areas_of((352, 100), (352, 176), (0, 0)), "not 2:1"),
        (areas_of((352, 176), (352, 176), (0, 60)), "leaves the sphere"),
        (areas_of((0, 0), (352, 176), (0, 0)), "below 1"),
    ],
)
def test_read_photo_areas_that_contradict_the_picture_are_not_used_and_said(areas, fault):
    got = read_photo(save(turned(SPHERE, 90), xmp=xmp_of(**areas, PoseHeadingDegrees=90)))
    assert difference(got, BAND) == 0
    assert fault in str(got.read)


def test_read_photo_spheres_xmp_left_on_a_band_still_says_its_heading():
    areas = areas_of((352, 176), (352, 176), (0, 0))
    got = read_photo(save(turned(BAND, 90), xmp=xmp_of(**areas, PoseHeadingDegrees=90)))
    assert difference(got, BAND) == 0
    assert "areas are not used" in str(got.read)


def test_read_photo_fov_is_not_used_of_what_xmp_knows():
    got = read_photo(save(SPHERE, xmp=xmp_of(**GPANO)), PhotoSettings(fov=60.0))
    assert difference(got, BAND) == 0
    assert "fov not used" in str(got.read)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_photo_orientation_is_applied_before_the_rest(orientation):
    turns = {2: 0, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # what undoes each; 2 itself
    stored = Image.fromarray(turned(SPHERE, 90))
    if orientation > 1:
        undo = Image.Exif()
        undo[0x0112] = turns[orientation] or 2
        stored = Image.fromarray(decode(save(stored, exif=undo)))
    got = read_photo(
        save(stored, exif=exif_of(orientation), xmp=xmp_of(**GPANO, PoseHeadingDegrees=90))
    )
    assert difference(got, BAND) == 0
    assert (got.read.width, got.read.height) == (WIDTH, HEIGHT)


def test_read_photo_one_colour_and_black_bars_are_named():
    assert "one colour" in str(read_photo(encode(np.full((64, 352, 3), 7, np.uint8))).read)
    barred = BAND.copy()
    barred[:8] = barred[-4:] = 0
    assert "black bars over 19% of its height" in str(read_photo(encode(barred)).read)
    barred = SPHERE.copy()
    barred[:, :176] = 0
    assert "black bars over 50% of its width" in str(
        read_photo(save(barred, xmp=xmp_of(**GPANO))).read
    )


def test_read_photo_half_a_turn_that_looks_like_a_band_is_warned_of():
    read = read_photo(encode(BAND[20:50, 40:205])).read
    assert any("do not meet" in warning for warning in read.warnings)


def test_read_photo_band_of_another_shape_is_taken_for_the_trained_one_and_said():
    squeezed = decode(encode(BAND), (64, 256))
    read = read_photo(encode(squeezed))
    assert read.data == encode(squeezed)
    assert (
        str(read.read) == "band 256 x 64, taken for the trained band, north assumed in the middle"
    )
    flat = read_photo(encode(decode(encode(BAND), (64, 176))))
    assert "2.8 times as wide as high" in flat.read.warnings[0]


def test_read_photo_limit_of_pixels_is_a_setting():
    data = save(SPHERE)
    assert read_photo(data, PhotoSettings(max_pixels=WIDTH * HEIGHT)).read.width == WIDTH
    with pytest.raises(BadImage, match=r"352 x 176 pixels, at most 61951 allowed.*--max-pixels"):
        read_photo(data, PhotoSettings(max_pixels=WIDTH * HEIGHT - 1))


def test_read_photo_band_that_rows_would_refuse_for_its_size_is_made_smaller(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    got = read_photo(save(BAND))
    turned_band = read_photo(save(BAND), PhotoSettings(heading=90.0))
    monkeypatch.undo()
    assert decode(got.data).shape == decode(turned_band.data).shape == (224, 1232, 3)
    assert np.array_equal(decode(turned_band.data), np.roll(decode(got.data), 308, axis=1))


def test_photo_settings_that_make_no_sense_are_refused():
    wrongs: list[dict[str, Any]] = [
        {"heading": 400.0},
        {"fov": 0.0},
        {"fov": 361.0},
        {"max_pixels": 0},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="expected"):
            PhotoSettings(**wrong)


def test_band_rays_span_the_trained_band():
    rise = np.degrees(np.arcsin(band.band_rays(224, 1232)[:, 616, 2]))
    assert rise[0] == pytest.approx(GROUND_FOV / 2 * (1 - 1 / 224))
    assert rise[-1] == pytest.approx(-rise[0])
