"""What the UNet is conditioned on: tokens of crops around the azimuth, and the BEV map."""

import pytest
import torch

from cvmatch.data import schema
from cvmatch.generate import losses
from cvmatch.generate.conditioning import PanoramaFeatures, PolarToBEV, count_crops, token_positions
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning
from tests.helpers.generator import PANORAMA, condition_of, ground_of


def test_gain_that_would_silence_the_bev_map_is_refused():
    with pytest.raises(ValueError, match="bev_gain above 0, got 0"):
        Conditioning(bev_gain=0.0)
    with pytest.raises(ValueError, match="low_freq_cells of at least 0, got -1"):
        Conditioning(low_freq_cells=-1)


def test_condition_has_all_tokens_of_all_crops(generator: Generator):
    assert condition_of(generator, ground_of(2)).tokens.shape == (2, 4 * (64 + 1), 64)
    assert [count_crops(224, width) for width in (224, 225, 1232)] == [1, 2, 6]


def test_condition_each_crop_has_tokens_of_its_own(generator: Generator):
    ground = ground_of(1)
    painted = ground.clone()
    painted[..., 32:96] = 1 - painted[..., 32:96]  # the second of four crops, which looks west
    before, after = (condition_of(generator, g).tokens.view(4, 65, 64) for g in (ground, painted))
    changed = (after - before).abs().amax(-1) > 1e-4
    assert changed[1].all()
    assert not changed[[0, 2, 3]].any()


def test_condition_of_cached_features_equals_that_of_the_panorama(generator: Generator):
    ground = ground_of(2)
    features = generator.encoders.encode_panorama(ground)
    stored = generator.condition(PanoramaFeatures(*(value.clone() for value in features)))
    assert torch.equal(stored.tokens, condition_of(generator, ground).tokens)


def test_condition_of_another_panorama_size_says_which_is_expected(generator: Generator):
    with pytest.raises(ValueError, match=r"expected panoramas of \(64, 256\)"):
        condition_of(generator, torch.zeros(1, 3, 64, 128))


def test_token_positions_look_south_west_north_east_at_the_crop_centres():
    azimuth, elevation = token_positions(64, 256, 8)
    heading = azimuth.view(4, 65)[:, 0].rad2deg() % 360
    torch.testing.assert_close(heading, torch.tensor([180.0, 270.0, 0.0, 90.0]))
    first = azimuth.view(4, 65)[0, 1:].view(8, 8)
    torch.testing.assert_close(first.diff(dim=1), torch.full((8, 7), 8 / 256 * 2 * torch.pi))
    rows = elevation.view(4, 65)[0, 1:].view(8, 8)[:, 0]
    torch.testing.assert_close(rows[[0, -1]], torch.tensor([0.875, -0.875]))


def test_bev_of_a_turned_panorama_is_the_turned_map():
    torch.manual_seed(0)
    network, ground = PolarToBEV(4).eval(), ground_of(2)
    turned = network(torch.roll(ground, -64, dims=-1), 16)
    torch.testing.assert_close(turned, network(ground, 16).rot90(1, (-2, -1)), atol=1e-4, rtol=1e-3)


def test_bev_bright_northern_columns_change_only_the_northern_part_most():
    torch.manual_seed(0)
    network, ground = PolarToBEV(4).eval(), torch.full((1, 3, *PANORAMA), 0.5)
    changed = ground.clone()
    changed[..., 120:136] = 1.0  # around the middle column: north
    difference = (network(changed, 16) - network(ground, 16)).abs().mean(dim=1)[0]
    assert difference[:4, 6:10].mean() > 2 * difference[-4:, 6:10].mean()


def test_dropped_condition_is_the_null_and_an_empty_map(generator: Generator):
    with torch.no_grad():
        generator.conditioner.null.copy_(torch.arange(64.0))
    condition = condition_of(generator, ground_of(2))
    half = generator.conditioner.drop(condition, torch.tensor([True, False]))
    assert torch.equal(half.tokens[0], condition.tokens[0])
    assert torch.equal(half.tokens[1], torch.arange(64.0).expand(260, 64))
    assert half.bev[0].abs().sum() > 0
    assert half.bev[1].abs().sum() == 0


def test_colours_of_bev_are_more_saturated_around_the_mean_colour_of_training():
    torch.manual_seed(0)
    network = PolarToBEV(4)
    bev, mean = torch.randn(6, 4, 8, 8), torch.tensor([0.7, 0.4, 0.2])
    tile = mean[:, None, None] + 0.1 * torch.randn(6, 3, 32, 32)
    mean = tile.mean(dim=(0, 2, 3))
    none = torch.full((6, 32, 32), schema.IGNORE, dtype=torch.uint8)
    for _ in range(120):  # fewer steps than the demo takes
        losses.bev_losses(network, bev, tile, none)
    losses.bev_losses(network.eval(), bev, 0 * tile, none)  # nothing is learnt in validation
    with torch.no_grad():
        pale = network.to_rgb(bev) / 2 + 0.5 - mean[:, None, None]
        vivid = network.predict_rgb(bev) - mean[:, None, None]
    torch.testing.assert_close(vivid, 1.4 * pale, atol=2e-3, rtol=0)
