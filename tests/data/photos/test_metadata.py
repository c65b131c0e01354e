import io
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from cvmatch.data.images import open_image, read_header
from cvmatch.data.photos.metadata import Metadata, SphereArea, parse_gpano, read_metadata
from tests.helpers.photo import areas_of, exif_of, save, xmp_of

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)


def metadata_of(kind: str = "PNG", **about) -> Metadata:
    return read_metadata(read_header(save(PIXELS, kind, **about)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("form", ["attributes", "elements"])
def test_read_metadata_knows_gpano_in_every_format_and_form(kind, form):
    pose = {"PoseHeadingDegrees": 225.5, "PosePitchDegrees": 3.3, "PoseRollDegrees": -0.7}
    areas = areas_of((100, 50), (80, 40), (10, 5))
    assert metadata_of(kind, xmp=xmp_of(form, **areas, **pose)) == Metadata(
        projection="equirectangular",
        area=SphereArea(100.0, 50.0, 80.0, 40.0, 10.0, 5.0),
        heading=225.5,
        pitch=3.3,
        roll=-0.7,
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_read_metadata_knows_what_exif_says_of_the_camera(kind):
    exif = exif_of(direction=90.25, reference="M", focal_length=26)
    assert metadata_of(kind, exif=exif) == Metadata(
        direction=90.25, magnetic=True, focal_length=26.0
    )


def test_read_metadata_of_a_plain_picture_is_empty():
    assert metadata_of() == Metadata()


@pytest.mark.parametrize(
    ("properties", "warning"),
    [
        ({"PoseHeadingDegrees": "north"}, "PoseHeadingDegrees is 'north', no number"),
        ({"PoseRollDegrees": "nan"}, "PoseRollDegrees is 'nan', no number"),
        ({"InitialViewHeadingDegrees": 90}, "where a viewer starts, no heading"),
        ({"FullPanoWidthPixels": 10}, "lacks FullPanoHeightPixels, Cropped"),
    ],
)
def test_read_metadata_what_cannot_be_used_is_named(properties, warning):
    about = metadata_of(xmp=xmp_of(**properties))
    assert about == Metadata(warnings=about.warnings)
    assert warning in about.warnings[0]


@pytest.mark.parametrize("direction", [Fraction(0, 1), 0.0])
def test_read_metadata_heading_of_zero_is_a_heading(direction):
    assert metadata_of(exif=exif_of(direction=direction)).direction == 0
    assert metadata_of(xmp=xmp_of(PoseHeadingDegrees=0)).heading == 0
    assert metadata_of(xmp=xmp_of(PoseHeadingDegrees=-90)).heading == 270


def test_read_metadata_fraction_by_zero_is_no_direction():
    data = bytearray(save(PIXELS, exif=exif_of(direction=Fraction(355, 113))))
    at = data.find((355).to_bytes(4, "little") + (113).to_bytes(4, "little"))
    order = "little"
    if at < 0:
        order = "big"
        at = data.find((355).to_bytes(4, order) + (113).to_bytes(4, order))
    assert at > 0
    exif = data[data.find(b"eXIf") + 4 :]
    broken = bytes(exif).replace((113).to_bytes(4, order), (0).to_bytes(4, order), 1)
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", exif=broken)
    assert read_metadata(read_header(buffer.getvalue())).direction is None


def test_parse_gpano_property_with_two_values_is_left_out_and_named():
    packet = xmp_of(PoseHeadingDegrees=10).replace(
        b"</rdf:RDF>",
        b'<rdf:Description xmlns:G="http://ns.google.com/photos/1.0/panorama/" '
        b'G:PoseHeadingDegrees="20" G:PosePitchDegrees="1"/></rdf:RDF>',
    )
    values, warnings = parse_gpano(packet)
    assert values == {"PosePitchDegrees": "1"}
    assert warnings == ["XMP PoseHeadingDegrees has several values"]


@pytest.mark.parametrize(
    "head",
    [
        b'<!DOCTYPE x [<!ENTITY a "90"><!ENTITY b "&a;&a;&a;">]>',
        b'<!DOCTYPE x SYSTEM "file:///etc/passwd">',
        b'<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1/">%a;]>',
    ],
    ids=["bomb", "file", "network"],
)
def test_parse_gpano_packet_with_a_document_type_is_not_read(head):
    values, warnings = parse_gpano(head + xmp_of(PoseHeadingDegrees=90))
    assert values == {}
    assert "document type" in warnings[0]
    wide = (head + xmp_of(PoseHeadingDegrees=90)).decode().encode("utf-16")
    assert parse_gpano(wide)[0] == {}


def test_parse_gpano_entity_is_never_resolved():
    values, warnings = parse_gpano(xmp_of(PoseHeadingDegrees="&a;"))
    assert values == {}
    assert "cannot be read" in warnings[0]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_read_metadata_damaged_metadata_is_a_warning_and_no_failure(data):
    packet = bytearray(xmp_of(PoseHeadingDegrees=90, ProjectionType="equirectangular"))
    for place in data.draw(st.lists(st.integers(0, len(packet) - 1), max_size=4)):
        packet[place] = data.draw(st.integers(1, 255))
    cut = bytes(packet[: data.draw(st.integers(1, len(packet)))])
    buffer = io.BytesIO()
    junk = b"Exif\0\0MM\0*\0\0\0\x08" + data.draw(st.binary(max_size=60))
    Image.fromarray(PIXELS).save(buffer, "JPEG", xmp=cut, exif=junk)
    header = read_header(buffer.getvalue())
    assert isinstance(read_metadata(header), Metadata)
    assert sorted(open_image(buffer.getvalue()).size) == [8, 16]


@pytest.mark.parametrize(
    ("tags", "position"),
    [
        ({1: "N", 2: (46.0, 30.0, 36.0), 3: "E", 4: (7.0, 0.0, 0.0)}, (46.51, 7.0)),
        ({1: "S", 2: (46.0, 30.0, 36.0), 3: "W", 4: (7.0, 30.0, 0.0)}, (-46.51, -7.5)),
        ({1: "N", 2: (46.0, 30.0, 36.0)}, None),
        ({1: "N", 2: (96.0, 0.0, 0.0), 3: "E", 4: (7.0, 0.0, 0.0)}, None),
        ({1: "N", 2: (Fraction(46), Fraction(0), Fraction(0)), 3: "E", 4: (7.0,)}, None),
    ],
    ids=["north-east", "south-west", "half", "impossible", "short"],
)
def test_read_metadata_knows_where_a_picture_was_taken(tags, position):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(tags)
    found = metadata_of("JPEG", exif=exif).position
    assert found == (None if position is None else pytest.approx(position))
