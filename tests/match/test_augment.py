"""Augmentation keeps the geometry of a pair."""

import pytest
import torch
from torch.nn import functional as F

from cvmatch.match.augment import TowerInputs, augment, blur, rotate90_pair
from cvmatch.nn import geometry, rng
from cvmatch.nn.color import color_jitter
from tests.helpers.matcher import (
    rows,
    views,
)
from tests.helpers.present import present


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_turned_pair_has_the_polar_view_of_the_turned_tile(turns, mirror):
    # A smooth tile (as real ones, after resizing), whose polar view stands in for the panorama.
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    tile = F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    pair = TowerInputs(geometry.to_polar(tile, 32, 64), tile, tile, (tile[:, 0] * 4).byte())
    chosen = torch.tensor([turns, turns]), torch.tensor([mirror, mirror])
    ground, aerial, synthetic, classes = rotate90_pair(pair, *chosen)
    torch.testing.assert_close(geometry.to_polar(aerial, 32, 64), ground, atol=1e-5, rtol=0)
    expected = torch.rot90(tile, turns, (-2, -1))
    expected = expected.flip(-1) if mirror else expected
    assert torch.equal(aerial, expected)
    assert torch.equal(present(synthetic), expected)
    assert torch.equal(present(classes), (expected[:, 0] * 4).byte())


def test_blurred_by_half_lies_between_the_picture_and_its_mean():
    picture = torch.zeros(2, 3, 5, 5)
    picture[:, :, 2, 2] = 0.9
    found = blur(picture, torch.tensor([0.0, 0.5]))
    assert torch.equal(found[0], picture[0])
    torch.testing.assert_close(found[1, :, 2, 2], torch.full((3,), 0.5))  # 0.9 / 2 + 0.1 / 2
    torch.testing.assert_close(found[1, :, 1, 1], torch.full((3,), 0.05))
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(blur(flat, torch.ones(1)), flat)  # the border is not darkened


def test_augmented_rows_turn_each_by_its_own_draw():
    batch = rows(64)
    whole = [present(view) for view in augment(views(batch), batch["key"], seed=0, epoch=0)]
    few = TowerInputs(*(present(view)[:5] for view in views(batch)))
    again = [present(view) for view in augment(few, batch["key"][:5], seed=0, epoch=0)]
    assert all(torch.allclose(a[:5], b) for a, b in zip(whole, again, strict=True))
    assert all(v.min() >= 0 and v.max() <= 1 for v in whole[:3])
    turns = {
        (k, flip)
        for before, after in zip(batch["synthetic_mask"], whole[3], strict=True)
        for k in range(4)
        for flip in (False, True)
        if torch.equal(after, before.rot90(k).flip(-1) if flip else before.rot90(k))
    }
    assert len(turns) == 8


def test_jittered_colours_differ_by_row_and_stream_and_keep_a_grey_picture_flat():
    key = torch.tensor([rng.row_key("a"), rng.row_key("b")])
    grey = torch.full((2, 3, 4, 4), 0.5)
    first, second = color_jitter(grey, key, 1), color_jitter(grey, key, 2)
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, second)
    assert torch.equal(first, first[..., :1, :1].expand(2, 3, 4, 4))
