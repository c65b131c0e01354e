"""The segmenter's training step: losses by hand, augmentation, counts."""

import math

import numpy as np
import pytest
import torch

from cvmatch.data.schema import IGNORE, PALETTE
from cvmatch.nn import metrics, rng
from cvmatch.segment.task import SegmenterTask, augment, class_weights, cross_entropy, dice
from tests.helpers.present import present
from tests.helpers.segmenter import SIZE, batch_of, picture


def test_cross_entropy_even_logits_are_the_log_of_the_classes():
    mask = torch.tensor([[[0, 4], [IGNORE, 2]]], dtype=torch.uint8)
    loss = cross_entropy(torch.zeros(1, 5, 2, 2), mask, torch.ones(5))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)


def test_cross_entropy_ignored_pixels_have_no_gradient():
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    mask = torch.tensor([[[0, 4], [IGNORE, 2]]], dtype=torch.uint8)
    cross_entropy(logits, mask, torch.ones(5)).backward()
    gradient = present(logits.grad).abs().sum(1)[0]
    assert gradient[1, 0] == 0
    assert (gradient.flatten()[[0, 1, 3]] > 0).all()


def test_cross_entropy_all_ignored_is_zero_and_finite():
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2, 2), IGNORE, dtype=torch.uint8), torch.ones(5))
    loss.backward()
    assert loss.item() == 0
    assert not present(logits.grad).any()


def test_cross_entropy_weights_move_the_mean_to_the_heavy_class():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 0] = math.log(3)  # class 0 has chance 3/4 everywhere
    mask = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    loss = cross_entropy(logits, mask, torch.tensor([1.0, 3.0])).item()
    assert loss == pytest.approx((math.log(4 / 3) + 3 * math.log(4)) / 4, abs=1e-6)


def test_class_weights_rare_class_weighs_more_and_ignored_pixels_count_not():
    masks = np.zeros((1, 10, 10), dtype=np.uint8)
    masks[0, 0] = 1
    masks[0, 9] = IGNORE
    expected = [1 / math.log(1.02 + 8 / 9), 1 / math.log(1.02 + 1 / 9), 1 / math.log(1.02)]
    assert class_weights(masks, 3) == pytest.approx(expected)


def test_dice_right_is_zero_wrong_is_one_and_ignored_is_left_out():
    mask = torch.tensor([[[0, 1], [1, IGNORE]]], dtype=torch.uint8)
    right = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])[None] * 50
    assert dice(right, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert dice(right.flip(1), mask).item() == pytest.approx(1.0, abs=1e-6)


def test_loss_sees_pixels_between_those_of_a_quarter_resolution_mask(task: SegmenterTask):
    tile = torch.from_numpy(picture(3, SIZE, SIZE).transpose(2, 0, 1).copy())[None]
    coarse = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    fine = torch.ones_like(coarse)
    fine[:, ::4, ::4] = 0  # the same mask once it is shrunk by four
    task.eval()
    with torch.no_grad():
        head = task.segmenter.net.decode_head.classifier
        head.weight.zero_()
        present(head.bias).copy_(torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0]))
        losses = [task(batch_of(tile, mask))["loss"].item() for mask in (coarse, fine)]
    assert losses[1] - losses[0] == pytest.approx(2 * 15 / 16, abs=1e-4)


def test_augment_turns_mask_and_tile_alike_in_all_eight_ways():
    tile = torch.randint(0, 200, (1, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    mask = tile[:, 0].byte()
    seen = set()
    for turns in range(4):
        for flip in (0.0, 0.9):
            lots = torch.tensor([[turns / 4, flip, 0.5, 0.5, 0.5]])  # 0.5: colours unchanged
            turned, turned_mask = augment(tile, mask, lots)
            torch.testing.assert_close(turned[:, 0].round().byte(), turned_mask)
            seen.add(tuple(turned_mask.flatten().tolist()))
    assert len(seen) == 8


def test_augment_jitter_keeps_the_mask_and_the_range():
    tile = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 255
    mask = torch.randint(0, 5, (4, 8, 8), dtype=torch.uint8)
    lots = torch.tensor([[0.0, 0.9, b, c, s] for b, c, s in [(0, 0.5, 0.5), (1, 1, 1)] * 2])
    coloured, same = augment(tile, mask, lots)
    assert torch.equal(same, mask)
    torch.testing.assert_close(coloured[0], 0.7 * tile[0])
    assert coloured.min() >= 0
    assert coloured.max() <= 255


def test_augment_row_does_not_depend_on_its_batch():
    keys = torch.tensor([rng.row_key(name) for name in ("0000001", "0000002", "0000003")])
    lots = rng.uniform(keys, rng.fold_in(0, 3, "segment"), 5)
    tile = torch.rand(3, 3, 8, 8) * 255
    mask = torch.randint(0, 5, (3, 8, 8), dtype=torch.uint8)
    together = augment(tile, mask, lots)
    alone = augment(tile[1:2], mask[1:2], lots[1:2])
    torch.testing.assert_close(together[0][1:2], alone[0])
    assert torch.equal(together[1][1:2], alone[1])


def test_task_draws_follow_the_epoch(task: SegmenterTask):
    tile = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    mask = torch.randint(0, 5, (4, SIZE, SIZE), dtype=torch.uint8)
    task.train()
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # so that a pass leaves nothing behind
    first, again, other = (task(batch_of(tile, mask, e))["loss"].item() for e in (0, 0, 1))
    assert first == again
    assert first != other


def test_task_validation_gives_miou_of_all_pixels(task: SegmenterTask):
    tile = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    mask = torch.randint(0, 5, (4, SIZE, SIZE), dtype=torch.uint8)
    mask[:, : SIZE // 4] = IGNORE
    task.eval()
    with torch.no_grad():
        halves = [task(batch_of(tile[i : i + 2], mask[i : i + 2])) for i in (0, 2)]
    means = {name: torch.stack([half[name] for half in halves]).mean(0) for name in halves[0]}
    summary = task.summary(means)
    predicted = task.segmenter.predict(tile)
    mean, per_class = metrics.miou(metrics.confusion(predicted, mask, 5))
    assert summary["miou"] == pytest.approx(mean, abs=1e-6)
    assert summary["iou/low_vegetation"] == pytest.approx(per_class[4], abs=1e-6)
    assert summary["ignored"] == pytest.approx(0.25)


def test_task_groups_hold_every_weight_once_and_the_head_at_ten_times(task: SegmenterTask):
    encoder, head = task.groups()
    assert head["lr"] == pytest.approx(10 * encoder["lr"])
    grouped = [id(weight) for group in (encoder, head) for weight in group["params"]]
    assert sorted(grouped) == sorted(id(weight) for weight in task.parameters())
    assert any(task.segmenter.net.decode_head.classifier.weight is w for w in head["params"])


def test_task_few_steps_learn_colours(task: SegmenterTask):
    ids = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, SIZE, SIZE).clone()
    ids[:, :, SIZE // 2 :] = torch.roll(ids[:, :, SIZE // 2 :], 1, dims=0)
    tile = torch.tensor(PALETTE, dtype=torch.uint8)[ids.long()].permute(0, 3, 1, 2)
    groups = [{**group, "lr": 0.01} for group in task.groups()]
    optimizer = torch.optim.AdamW(groups)
    task.train()
    for step in range(40):
        optimizer.zero_grad()
        task(batch_of(tile, ids, step))["loss"].backward()
        optimizer.step()
    task.eval()
    with torch.no_grad():
        found = task.summary(task(batch_of(tile, ids)))
    assert found["miou"] > 0.8  # chance is about 0.1
