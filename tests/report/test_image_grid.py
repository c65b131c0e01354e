import pytest

from cvmatch.report.image_grid import make_image_grid
from tests.helpers.report import example, plain

GREEN = (22, 150, 72)


def test_make_image_grid_right_answer_alone_has_a_green_frame():
    grid = make_image_grid([example(top=("a", "0000007", "b"))], side=20)
    side, wide = 20 + 6, 80 + 6  # three pixels of gap or frame on each side
    assert grid.shape == (side, wide + 6 * side, 3)
    corners = [tuple(grid[0, wide + i * side].tolist()) for i in range(6)]
    assert [corner == GREEN for corner in corners] == [False, False, False, False, True, False]


def test_make_image_grid_uneven_examples_fill_one_picture():
    grid = make_image_grid([example(top=("a", "b")), example(top=("a",), synthetic=None)], side=20)
    assert grid.shape == (2 * 26, 86 + 5 * 26, 3)
    assert (grid[26:, -26:] == 255).all()  # no second answer
    assert (grid[26:, 86 : 86 + 26] == 255).all()  # no A


def test_make_image_grid_wide_panorama_keeps_its_shape():
    grid = make_image_grid([example(ground=plain(0, (10, 80)))], side=20)
    dark = (grid[:, :86] == 0).all(axis=2)
    assert (dark.any(axis=0).sum(), dark.any(axis=1).sum()) == (80, 10)


def test_make_image_grid_without_examples_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        make_image_grid([])
