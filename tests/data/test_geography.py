import math

import numpy as np
import pytest
import torch
from rasterio import warp

from cvmatch.data import geography


def test_offset_is_the_distance_of_near_places_and_goes_the_short_way_round():
    start, to = (60.0, 179.999), (60.001, -179.999)
    east, north = geography.offset_m(start, to)
    both = torch.tensor([start, to], dtype=torch.float64)
    assert np.hypot(east, north) == pytest.approx(
        geography.haversine_distance(both[0], both[1]).item(), rel=1e-4
    )
    assert east == pytest.approx(north, rel=1e-3)  # twice the degrees, at half the size
    assert north > 0


def test_areas_hold_what_lies_in_them():
    latitude = np.array([0.0, 0.0, 10.0, np.nan, 0.0])
    longitude = np.array([0.0, 1.0, 0.0, 0.0, 179.9])
    degree = 2 * np.pi * geography.EARTH_M / 360
    circle = geography.Circle(0.0, 0.0, degree * 1.001)
    assert circle.contains(latitude, longitude).tolist() == [True, True, False, False, False]
    box = geography.Box(-1.0, -0.5, 20.0, 0.5)
    assert box.contains(latitude, longitude).tolist() == [True, False, True, False, False]
    across = geography.Box(-1.0, 179.0, 1.0, -179.0)  # over the date line
    assert across.contains(latitude, longitude).tolist() == [False] * 4 + [True]
    assert across.contains(latitude[:1], np.array([-179.5])).tolist() == [True]


def test_box_with_a_meridian_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\[-180, 180\], got 170.0 to 190.0.*170 and -170"):
        geography.Box(-1.0, 170.0, 1.0, 190.0)


def test_metres_of_known_arcs():
    pole, equator = torch.tensor([90.0, 0.0]), torch.tensor([0.0, 123.0])
    quarter = math.pi / 2 * 6_371_008.8
    assert geography.haversine_distance(pole, equator).item() == pytest.approx(quarter, rel=1e-6)
    one = torch.tensor([[60.0, 10.0]], dtype=torch.float64)
    other = torch.tensor([[60.0, 10.001]], dtype=torch.float64)
    step = 6_371_008.8 * math.radians(0.001) * math.cos(math.radians(60))
    assert geography.haversine_distance(one, other).item() == pytest.approx(step, rel=1e-6)


@pytest.mark.parametrize(("zone", "south"), [(55, True), (32, False), (1, False), (60, True)])
def test_utm_is_that_of_proj(zone, south):
    draw = np.random.default_rng(zone)
    east, north = draw.uniform(1.7e5, 8.3e5, 200), draw.uniform(1e5, 9.2e6, 200)
    if south:
        north = 1e7 - north
    code = f"EPSG:{327 if south else 326}{zone:02d}"
    longitude, latitude = warp.transform(code, "EPSG:4326", east.tolist(), north.tolist())[:2]
    found = geography.utm_to_degrees(east, north, zone, south)
    np.testing.assert_allclose(found[0], latitude, atol=1e-8)  # 1 mm
    off = (found[1] - np.array(longitude) + 180) % 360 - 180
    assert np.abs(off * np.cos(np.radians(found[0]))).max() < 1e-8
