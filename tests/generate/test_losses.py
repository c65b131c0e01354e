"""Losses: closed forms, what they reward, and the queue of negatives."""

import pytest
import torch
import torchmetrics.functional.image.lpips as reference
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from cvmatch.data import schema
from cvmatch.generate import losses
from cvmatch.generate.conditioning import PolarToBEV
from cvmatch.generate.losses import LPIPS, NegativeQueue, load_lpips_weights, tile_info_nce
from tests.helpers.generator import raw_batch
from tests.helpers.present import present


def test_select_rows_leaves_out_rows_of_little_signal():
    signal, draw = torch.tensor([0.1, 0.9, 0.5, 0.4]), torch.tensor([0.0, 0.7, 0.2, 0.9])
    rows, strength = losses.select_rows(signal, draw, 2, 0.3)
    assert rows.tolist() == [2, 1]
    torch.testing.assert_close(strength, torch.tensor([0.5, 0.9]))
    rows, strength = losses.select_rows(signal, draw, 2, 0.6)
    assert rows.tolist() == [1, 0]
    torch.testing.assert_close(strength, torch.tensor([0.9, 0.0]))


def test_tile_info_nce_rewards_images_nearest_to_their_own_tile():
    true = torch.nn.functional.adaptive_avg_pool2d(raw_batch(6)["aerial"].float() / 127.5 - 1, 8)
    everyone = torch.ones(6, dtype=torch.bool)
    assert tile_info_nce(true, true, everyone) < 0.1
    assert tile_info_nce(true.roll(1, 0), true, everyone) > 2
    # A drawing that is left out neither counts nor is a negative: here, row 0 is a copy of row 1's.
    copied = torch.cat([true[1:2], true[1:]])
    others = everyone.clone()
    others[0] = False
    assert tile_info_nce(copied, true, others) < 0.1 < tile_info_nce(copied, true, everyone)
    assert tile_info_nce(true, true, ~everyone) == 0


def test_queue_makes_an_image_like_earlier_tiles_worse_but_not_the_own_tile():
    tiles = raw_batch(4)["aerial"].float() / 255
    drawn, mine = tiles[:2] * 0.5 + tiles[2:] * 0.5, torch.ones(2, dtype=torch.bool)
    queue = NegativeQueue(size=16, tiles=2)
    keys = torch.tensor([1, 2])

    def seen_as(keys: torch.Tensor) -> float:
        return float(tile_info_nce(drawn, tiles[:2], mine, queue.negatives(keys)))

    alone = float(tile_info_nce(drawn, tiles[:2], mine))
    assert seen_as(keys) == pytest.approx(alone)  # empty
    queue.enqueue(torch.tensor([3, 4]), tiles[2:])
    both = seen_as(keys)
    assert both > alone + 0.01
    assert seen_as(torch.tensor([3, 4])) < both  # a tile is no negative of its own panorama
    queue.enqueue(torch.tensor([5, 6]), 1 - tiles[2:])  # two fit: the first ones are gone
    assert seen_as(keys) < both


def test_bev_losses_of_the_true_tile_are_best():
    batch, kinds = raw_batch(6), len(schema.PALETTE)
    tile, classes = batch["aerial"].float() / 255, batch["aerial_mask"]
    named = F.one_hot(classes.long(), kinds).movedim(-1, 1).float()
    drawn = torch.cat([F.adaptive_avg_pool2d(tile * 2 - 1, 64), named], dim=1)
    network = PolarToBEV(3 + kinds)  # whose map is the tile's colours, and its classes
    with torch.no_grad():
        for part, first in ((network.to_rgb, 0), (network.to_classes, 3)):
            present(part.bias).zero_()
            part.weight.zero_()[:, first : first + len(part.weight), 0, 0] = torch.eye(
                len(part.weight)
            )
        network.to_classes.weight.mul_(20)
    right = losses.bev_losses(network, drawn, tile, classes)
    wrong = losses.bev_losses(network, drawn.roll(1, 0), tile, classes)
    assert right["bev"] < 1e-6 < wrong["bev"]
    assert right["bev_nce"] < 0.1
    assert wrong["bev_nce"] > 2
    assert right["bev_class"] < 1e-6
    assert wrong["bev_class"] > 2


def test_class_loss_is_the_cross_entropy_of_the_pixels_that_have_a_class():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4, 4)
    classes = torch.randint(0, 6, (2, 8, 8)).byte()
    classes[0, :3] = schema.IGNORE
    pixels = logits.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected = F.cross_entropy(pixels, classes.long(), ignore_index=schema.IGNORE)
    torch.testing.assert_close(losses.class_loss(logits, classes), expected)
    classes[:] = schema.IGNORE
    assert losses.class_loss(logits, classes) == 0


def test_lpips_equals_torchmetrics_with_the_same_random_weights():
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=False)
    theirs = reference._LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    numbered = {
        name.split(".")[-2] + "." + name.split(".")[-1]: name for name in theirs.net.state_dict()
    }
    theirs.net.load_state_dict(
        {long: features.state_dict()[short] for short, long in numbered.items()}
    )
    ours = LPIPS(features, load_lpips_weights())
    first, second = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    expected = theirs(first, second, normalize=True).flatten()
    assert expected.min() > 0
    torch.testing.assert_close(ours(first, second), expected, atol=1e-6, rtol=1e-4)


def test_lpips_of_equal_pictures_is_zero_and_of_others_is_not(lpips: LPIPS):
    picture = torch.rand(2, 3, 32, 32)
    assert lpips(picture, picture).abs().max() == 0
    assert lpips(picture, picture.flip(0)).min() > 0
