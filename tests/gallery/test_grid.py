"""Cells are squares of the ground, and the same ones whatever part of the earth is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmatch.gallery.grid import Cells, Grid, latitude_at, meridian_arc
from tests.helpers.imagery import transform

LATITUDES = [-70, -47, 0, 47, 70]


def around(latitude: float, longitude: float = 7.44, degrees: float = 0.01):
    return longitude - degrees, latitude - degrees, longitude + degrees, latitude + degrees


def ground(middle: tuple[float, float], longitude: float, latitude: float) -> np.ndarray:
    """Metres east and north of a place, along geodesics, by PROJ."""
    lat, lon = middle
    local = f"+proj=aeqd +lat_0={lat:.12f} +lon_0={lon:.12f} +datum=WGS84 +units=m"
    east, north = transform("EPSG:4326", local, [longitude], [latitude])
    return np.array([east[0], north[0]])


@pytest.mark.parametrize("metres", [60.0, 500.0])
@pytest.mark.parametrize("latitude", LATITUDES)
def test_cell_is_as_wide_and_as_high_on_the_ground_as_asked_for(latitude, metres):
    grid = Grid(metres, 0.5)
    cells = grid.within(around(latitude)).take(np.array([0, 1]))
    lat, lon = (values[0] for values in grid.middles(cells))
    west, south, east, north = grid.boxes(cells)[0]
    middle = (float(lat), float(lon))
    wide = ground(middle, east, lat)[0] - ground(middle, west, lat)[0]
    high = ground(middle, lon, north)[1] - ground(middle, lon, south)[1]
    assert (wide, high) == pytest.approx((metres, metres), rel=1e-6)
    edge = ground(middle, east, north)[0] - ground(middle, west, north)[0]
    bound = np.tan(np.radians(abs(latitude) + 0.02)) * metres / 2 / 6_371_000  # as Grid says
    assert abs(edge / metres - 1) < 1.02 * bound + 1e-6


@pytest.mark.parametrize("latitude", LATITUDES)
def test_neighbours_share_the_overlap(latitude):
    grid = Grid(60.0, 0.25)
    cells = grid.within(around(latitude))
    boxes = grid.boxes(cells)
    same_row = cells.row == cells.row[0]
    west, _, east, _ = boxes[same_row].T
    shared = (east[:-1] - west[1:]) / (east[:-1] - west[:-1])
    assert shared == pytest.approx(0.25, abs=1e-4)
    rows = np.unique(cells.row)
    south, north = grid.boxes(Cells(rows, np.zeros_like(rows)))[:, [1, 3]].T
    shared = (north[:-1] - south[1:]) / (north[:-1] - south[:-1])
    assert shared == pytest.approx(0.25, abs=1e-4)


def test_cells_of_a_part_are_those_of_the_whole_with_the_same_names():
    grid = Grid(60.0, 0.5)
    whole = set(grid.ids(grid.within(around(47, degrees=0.01))))
    part = set(grid.ids(grid.within(around(47.002, degrees=0.004))))
    assert part < whole
    assert not part & set(Grid(50.0, 0.5).ids(Grid(50.0, 0.5).within(around(47))))
    assert not part & set(Grid(60.0, 0.25).ids(Grid(60.0, 0.25).within(around(47))))


def test_names_say_size_overlap_and_place():
    cells = Cells(np.array([173_847, -2]), np.array([-10, 3]))
    assert Grid(60.0, 0.5).ids(cells) == ["60m-0.5-N173847-W10", "60m-0.5-S2-E3"]


def test_rows_close_round_the_earth_without_a_cell_twice():
    grid = Grid(100_000.0, 0.0)
    cells = grid.within((-180.0, -90.0, 180.0, 90.0))
    assert len(set(grid.ids(cells))) == len(cells)
    latitude, longitude = grid.middles(cells)
    assert np.all((longitude >= -180) & (longitude < 180))
    area = 4 * np.pi * 6_371_007**2 * np.sin(np.radians(latitude.max()))
    assert len(cells) * 1e10 == pytest.approx(area, rel=0.01)
    steps = np.diff(np.sort(longitude[cells.row == 40]))
    assert steps == pytest.approx(steps[0])
    assert 360 - steps.sum() == pytest.approx(steps[0])


def test_too_many_cells_are_refused_before_they_are_listed():
    with pytest.raises(
        ValueError, match=r"at most 500,000,000 cells, got up to .* smaller --region"
    ):
        Grid(1.0, 0.5).within((-180.0, -80.0, 180.0, 80.0))


@settings(deadline=None)  # a busy machine is no failure
@given(st.floats(-89.9, 89.9))
def test_latitude_of_an_arc_is_that_which_it_was_made_of(latitude):
    there = latitude_at(meridian_arc(np.array([latitude])))
    assert float(there[0]) == pytest.approx(latitude, abs=1e-8)
