import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmatch.nn.geometry import (
    GROUND_FOV,
    cartesian_grid,
    crop_azimuths,
    crop_field_of_view,
    crop_starts,
    polar_to_cartesian,
    rotate90_panorama,
    rotate90_tile,
    see_part,
    to_polar,
    to_polar_image,
    tried,
    try_headings,
)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def smooth(size: int) -> torch.Tensor:
    """A tile that turns into another picture when turned or mirrored, without fine detail."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:size, :size] / size
    waves = rng.uniform(-2, 2, (6, 2)), rng.uniform(0, 6, 6)
    picture = sum(np.sin(2 * np.pi * (a * x + b * y) + p) for (a, b), p in zip(*waves, strict=True))
    return torch.tensor(picture, dtype=torch.float32)[None, None]


def safa(tile: np.ndarray, height: int, width: int) -> np.ndarray:
    """SAFA's polar transform, pixel by pixel, from its published formula.

    It names the point at a distance from the tile's edge (S/2 is the middle of S pixels), and pixel
    k is centred at k + 1/2.
    """
    size = len(tile)
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            r = size / 2 * (height - 1 - i) / height
            theta = 2 * np.pi * j / width
            row = size / 2 + r * np.cos(theta) - 0.5
            col = size / 2 - r * np.sin(theta) - 0.5
            top, left = math.floor(row), math.floor(col)
            for y, wy in ((top, top + 1 - row), (top + 1, row - top)):
                for x, wx in ((left, left + 1 - col), (left + 1, col - left)):
                    at = min(max(y, 0), size - 1), min(max(x, 0), size - 1)
                    out[i, j] += wy * wx * tile[at]
    return out


@pytest.mark.parametrize(("size", "height", "width"), [(24, 10, 32), (37, 9, 22), (16, 16, 64)])
def test_polar_agrees_with_safas_formula(size, height, width):
    tile = noise(1, 1, size, size)
    expected = safa(tile[0, 0].numpy(), height, width)
    assert np.allclose(to_polar(tile, height, width)[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("direction", "blob", "share"),
    [
        ("north", (4, 32), 1 / 2),
        ("east", (32, 60), 3 / 4),
        ("south", (60, 32), 0),
        ("west", (32, 4), 1 / 4),
        ("north-east", (12, 52), 5 / 8),
    ],
)
def test_polar_blob_appears_in_the_column_of_its_direction(direction, blob, share):
    tile = torch.zeros(1, 1, 64, 64)
    tile[..., blob[0] - 2 : blob[0] + 2, blob[1] - 2 : blob[1] + 2] = 1
    columns = to_polar(tile, 32, 128)[0, 0].sum(0)
    # Rolled so that the wanted column is in the middle, the blob's mass is centred there.
    centred = torch.roll(columns, 64 - int(128 * share))
    middle = (centred * torch.arange(128)).sum() / centred.sum()
    assert columns.sum() > 1
    assert abs(float(middle) - 64) < 1


def test_polar_bottom_row_is_the_camera_and_top_row_the_circle():
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    distance = torch.tensor(np.hypot(x, y) / 32, dtype=torch.float32)[None, None]
    view = to_polar(distance, 16, 32)[0, 0]
    expected = (15 - torch.arange(16)) / 16
    assert torch.allclose(view.mean(1), expected, atol=0.03)


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(4, 40),
    height=st.integers(2, 20),
    quarter=st.integers(1, 16),
    turns=st.integers(0, 3),
    mirror=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotate90_panorama_is_the_polar_view_of_the_turned_tile(
    size, height, quarter, turns, mirror, seed
):
    tile = torch.rand((2, 3, size, size), generator=torch.Generator().manual_seed(seed))
    change = torch.tensor([turns, 0]), torch.tensor([mirror, False])  # the second row stays
    view = to_polar(tile, height, 4 * quarter)
    turned = to_polar(rotate90_tile(tile, *change), height, 4 * quarter)
    assert torch.allclose(turned, rotate90_panorama(view, *change), atol=1e-4)
    assert torch.equal(rotate90_panorama(view, *change)[1], view[1])


def test_polar_of_a_mirrored_tile_is_the_reversed_polar():
    tile = noise(1, 1, 20, 20)
    view = to_polar(tile, 8, 16)
    reverse = [-column % 16 for column in range(16)]
    assert torch.allclose(to_polar(tile.flip(-1), 8, 16), view[..., reverse], atol=1e-5)
    assert not torch.allclose(view, view[..., reverse], atol=0.1)


def test_to_polar_image_keeps_colours_and_class_ids():
    tile = (noise(24, 24, 3) * 255).byte().numpy()
    expected = to_polar(torch.from_numpy(tile).permute(2, 0, 1)[None].float(), 8, 32)[0]
    view = to_polar_image(tile, 8, 32)
    assert view.shape == (8, 32, 3)
    assert view.dtype == np.uint8
    assert np.abs(view - expected.permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-3
    ids = np.where(tile[..., 0] > 128, 4, 255).astype(np.uint8)
    assert to_polar_image(ids, 8, 32, nearest=True).shape == (8, 32)
    assert set(np.unique(to_polar_image(ids, 8, 32, nearest=True))) == {4, 255}


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    pairs = torch.stack([one.flatten(), other.flatten()])
    return float(torch.corrcoef(pairs)[0, 1])


def circle(size: int, radius: float) -> torch.Tensor:
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    return torch.tensor(np.hypot(x, y) < radius * size / 2)


def test_polar_to_cartesian_of_a_polar_view_gives_the_tile_within_the_circle():
    tile, inside = smooth(64), circle(64, 0.95)
    laid = polar_to_cartesian(to_polar(tile, 64, 256), 64)
    assert float((laid - tile)[..., inside].abs().max()) < 0.1 * float(tile.std())
    for wrong in (tile.flip(-1), tile.flip(-2), tile.rot90(1, (-2, -1)), tile.rot90(2, (-2, -1))):
        assert correlation(laid[..., inside], wrong[..., inside]) < 0.7


@pytest.mark.parametrize("rows", [8, 32])
def test_polar_to_cartesian_of_distances_gives_each_cell_its_distance(rows):
    """A row too far in or out (half a row is 1/16 at 8 rows) shows as a constant error."""
    distances = ((rows - 1 - torch.arange(rows)) / rows)[None, None, :, None].expand(1, 1, rows, 16)
    y, x = np.mgrid[:48, :48] + 0.5 - 24
    expected = torch.tensor(np.hypot(x, y) / 24, dtype=torch.float32)
    laid = polar_to_cartesian(distances.contiguous(), 48)[0, 0]
    inside = circle(48, (rows - 1) / rows)
    assert torch.allclose(laid[inside], expected[inside], atol=1e-4)


def test_polar_to_cartesian_south_has_no_seam():
    azimuth = 2 * math.pi * torch.arange(64) / 64
    rays = torch.cos(azimuth)[None, None, None].expand(1, 1, 8, 64).contiguous()  # 1 in the south
    laid = polar_to_cartesian(rays, 63)[0, 0]
    south = laid[45:60, 28:35]
    assert float((south - south.flip(1)).abs().max()) < 1e-4
    assert float(south.min()) > 0.9
    assert float(laid[3:18, 28:35].max()) < -0.9


def test_cartesian_grid_names_the_azimuth_and_the_distance():
    grid = cartesian_grid(5)  # cells are centred; [0, 2] is due north, 0.8 of the way to the edge
    assert torch.allclose(grid[0, 2], torch.tensor([0.0, 1 - 2 * 0.8]), atol=1e-6)
    assert torch.allclose(grid[2, 4], torch.tensor([0.5, 1 - 2 * 0.8]), atol=1e-6)
    assert torch.allclose(grid[2, 0], torch.tensor([-0.5, 1 - 2 * 0.8]), atol=1e-6)
    assert torch.allclose(grid[4, 2].abs(), torch.tensor([1.0, 0.6]), atol=1e-6)
    assert torch.allclose(grid[0, 4], torch.tensor([0.25, -1.0]), atol=1e-6)  # clamped


@pytest.mark.parametrize("crops", [1, 3, 4, 8])
def test_crop_azimuths_are_square_and_centred_evenly_from_the_south(crops):
    panorama = torch.arange(64.0).expand(2, 3, 16, 64)
    windows = crop_azimuths(panorama, crops)
    assert windows.shape == (2, crops, 3, 16, 16)
    for index in range(crops):
        centre = round(index * 64 / crops) % 64
        assert abs(float(windows[0, index, 0, 0, 8]) - centre) <= 1
        steps = windows[0, index, 0, 0].diff() % 64
        assert (steps == 1).all()  # neighbours stay neighbours across the wrap


def test_crop_azimuths_first_wraps_around_the_south():
    windows = crop_azimuths(torch.arange(64.0).expand(1, 1, 16, 64), 4)
    assert windows[0, 0, 0, 0].tolist() == [*range(56, 64), *range(8)]
    assert crop_starts(64, 16, 4) == [56, 8, 24, 40]


@pytest.mark.parametrize(
    ("heading", "centre"),
    [(0.0, 32), (90.0, 48), (180.0, 0), (270.0, 16), (-90.0, 16), (450.0, 48)],
)
@pytest.mark.parametrize("degrees", [70.0, 90.0, 180.0])
def test_crop_field_of_view_is_centred_on_its_heading(degrees, heading, centre):
    part = crop_field_of_view(
        torch.arange(64.0).expand(1, 1, 2, 64), degrees, torch.tensor([float(heading)])
    )[0, 0, 0]
    assert len(part) == round(64 * degrees / 360)
    assert (part.diff() % 64 == 1).all()
    offset = (float(part[0]) + len(part) / 2 - centre + 32) % 64 - 32
    assert abs(offset) <= 0.5


def test_crop_field_of_view_of_360_only_turns():
    panorama = noise(1, 3, 4, 64)
    assert torch.equal(crop_field_of_view(panorama, 360.0, torch.zeros(len(panorama))), panorama)
    turned = crop_field_of_view(panorama, 360.0, torch.full((len(panorama),), 90.0))
    assert torch.equal(turned, torch.roll(panorama, -16, dims=-1))


def test_crop_field_of_view_of_a_hair_has_one_column():
    assert crop_field_of_view(noise(1, 3, 4, 64), 0.1, torch.zeros(1)).shape[-1] == 1


def test_ground_fov_is_that_of_cvusa_panoramas():
    # 1232 x 224 of a panorama whose 1232 columns are 360 degrees: equal degrees a pixel both ways.
    assert pytest.approx(360 * 224 / 1232) == GROUND_FOV


def test_crop_field_of_view_of_panoramas_on_a_device_takes_headings_of_the_cpu():
    part = crop_field_of_view(torch.empty(2, 3, 8, 16, device="meta"), 90.0, torch.zeros(2))
    assert part.shape == (2, 3, 8, 4)


def test_tried_headings_bring_north_to_the_middle():
    north_up = torch.rand(2, 3, 4, 24, generator=torch.Generator().manual_seed(0))
    for turn in (0, 1, 5):  # of 24 columns: the middle looks 15 degrees times that from north
        turned = north_up.roll(-turn, dims=-1)
        found = try_headings(turned, 24)
        assert found.shape == (2, 24, 3, 4, 24)
        assert tried(24)[turn] == 15 * turn
        torch.testing.assert_close(found[:, turn], north_up)
        assert not torch.equal(found[:, turn + 1], north_up)


@pytest.mark.parametrize("width", [24, 25])
def test_a_part_is_seen_in_its_place_and_the_rest_is_filled(width):
    panorama = torch.rand(4, 3, 2, width, generator=torch.Generator().manual_seed(1))
    degrees = torch.tensor([90.0, 360.0, 200.0, 10.0])
    heading = torch.tensor([0.0, 33.0, 170.0, 300.0])
    fill = torch.tensor([0.1, 0.2, 0.3])
    found = see_part(panorama, degrees, heading, fill)
    for row in range(4):
        for column in range(width):
            azimuth = (column + 0.5) / width * 360 - 180  # clockwise from north
            off = abs((azimuth - heading[row].item() + 180) % 360 - 180)
            seen = off <= degrees[row] / 2
            expected = panorama[row, :, :, column] if seen else fill[:, None].expand(3, 2)
            torch.testing.assert_close(found[row, :, :, column], expected)
