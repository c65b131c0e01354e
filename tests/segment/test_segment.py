"""Segmenter: one preprocessing for training and inference, loss at the mask's resolution, rows."""

import json
import math
import os

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from pyarrow import parquet
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cvmatch import config as configs
from cvmatch.data import images, manifest, schema
from cvmatch.data.images import BadImage
from cvmatch.data.pairs import PairDataset
from cvmatch.data.schema import IGNORE, PALETTE
from cvmatch.data.settings import Ingest
from cvmatch.nn import metrics, rng
from cvmatch.runtime import tracking
from cvmatch.runtime.settings import Pool
from cvmatch.segment import windows
from cvmatch.segment.batches import FILE, Preprocess, decode, synthesized
from cvmatch.segment.infer import SegmentAerial, segment
from cvmatch.segment.model import BASES, Segmenter, enlarge
from cvmatch.segment.settings import Segment, TrainSegmenter
from cvmatch.segment.train import (
    SegmenterTask,
    augment,
    class_weights,
    cross_entropy,
    dice,
    labelled,
    train,
    training_rows,
)
from cvmatch.synthesize.settings import Synthesize
from cvmatch.training.settings import Fit

SIZE = 64


def segformer(num_labels: int, **changes: float) -> SegformerForSemanticSegmentation:
    """A SegFormer of 8 to 16 channels, without dropout so that two passes agree."""
    small = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4}
    dry = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "decoder_hidden_size": 16}
    torch.manual_seed(0)
    return SegformerForSemanticSegmentation(
        SegformerConfig(num_labels=num_labels, **small, **dry, **changes)
    )


def picture(seed: int, height: int = 90, width: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch_of(tile: torch.Tensor, mask: torch.Tensor, epoch: int = 0) -> dict[str, torch.Tensor]:
    return {
        "tile": tile,
        "mask": mask,
        "key": torch.arange(len(tile)),
        "epoch": torch.tensor(epoch),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model with ADE's 150 classes, on disk as `--base` takes it."""
    directory = str(tmp_path_factory.mktemp("segformer"))
    segformer(150).save_pretrained(directory)
    return directory


@pytest.fixture
def task(base: str) -> SegmenterTask:
    config = TrainSegmenter(size=SIZE, base=base)
    return SegmenterTask(Segmenter.from_base(base, Preprocess(size=SIZE)), config)


@pytest.fixture
def published(task: SegmenterTask, tmp_path: os.PathLike) -> str:
    directory = os.path.join(tmp_path, "segmenter")
    os.makedirs(directory)
    task.save(directory)
    return directory


@pytest.fixture
def lively() -> Segmenter:
    """A segmenter of wide random weights: its logits vary by more than 1 between pixels."""
    return Segmenter(segformer(5, initializer_range=0.2), Preprocess(size=SIZE)).eval()


def rows_of(**changes: list) -> dict[str, np.ndarray]:
    """Three rows with pictures and class maps."""
    maps = [images.encode(images.colours_of(np.full((90, 70), i, np.uint8))) for i in range(3)]
    columns = {
        schema.PAIR_ID: ["0000007", "0000008", "0000009"],
        schema.AERIAL: [images.encode(picture(i)) for i in range(3)],
        schema.SYNTHETIC: [images.encode(picture(9 - i)) for i in range(3)],
        schema.CLASSES: maps,
        schema.ERROR: [None, None, None],
    }
    arrays = {name: np.empty(3, dtype=object) for name in columns}
    for name, values in {**columns, **changes}.items():
        arrays[name][:] = values
    return arrays


def test_segmenter_training_and_inference_give_equal_logits(task: SegmenterTask, published: str):
    rows = rows_of()
    decoded = decode(rows, task.segmenter.preprocess)
    task.eval()
    with torch.no_grad():
        trained = task.segmenter.logits(torch.from_numpy(decoded["tile"]).float())
    actor = SegmentAerial(published, schema.AERIAL)
    tiles = np.stack([actor.segmenter.preprocess.tile(data) for data in rows[schema.AERIAL]])
    with torch.no_grad():
        inferred = actor.segmenter.logits(torch.from_numpy(tiles))
    torch.testing.assert_close(inferred, trained, rtol=0, atol=0)
    expected = enlarge(trained, SIZE).argmax(1).numpy()
    found = [images.decode_ids(data) for data in actor(rows)[schema.SYNTHETIC_CLASSES]]
    np.testing.assert_array_equal(np.stack(found), expected)


def planes(seed: int, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """A picture as the network's input wants it: (3, height, width)."""
    return torch.from_numpy(picture(seed, height, width)).permute(2, 0, 1).contiguous()


def test_scores_flip_is_the_mean_over_picture_and_mirror(lively: Segmenter):
    tiles = torch.stack([planes(1), planes(2)])
    with torch.no_grad():
        plain, mirrored = (lively.scores(t) for t in (tiles, tiles.flip(-1)))
        flipped = lively.scores(tiles, flip=True)
    torch.testing.assert_close(flipped, (plain + mirrored.flip(-1)) / 2, atol=1e-4, rtol=0)
    assert (plain - mirrored.flip(-1)).abs().max() > 1  # without it, the mirror matters


def test_scores_flip_of_the_mirror_are_the_mirrored_scores(lively: Segmenter):
    tiles = torch.stack([planes(1), planes(2)])
    with torch.no_grad():
        scores, mirrored = (lively.scores(t, flip=True) for t in (tiles, tiles.flip(-1)))
    torch.testing.assert_close(mirrored.flip(-1), scores, atol=1e-4, rtol=0)
    maps = [lively.predict(t, flip=True) for t in (tiles, tiles.flip(-1))]
    assert (maps[0] == maps[1].flip(-1)).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("flip", [False, True])
def test_predict_large_of_a_tile_is_the_plain_prediction(lively: Segmenter, flip: bool):
    tile = planes(1)
    plain = lively.predict(tile[None], flip=flip)[0]
    assert len(plain.unique()) > 1
    assert torch.equal(lively.predict_large(tile, flip=flip), plain)


@given(
    length=st.integers(1, 400),
    size=st.integers(1, 64),
    overlap=st.floats(0, 1, exclude_max=True),
)
def test_windows_cover_everything_and_overlap(length: int, size: int, overlap: float):
    found = windows.starts(length, size, overlap)
    seen = {pixel for start in found for pixel in range(start, start + size)}
    assert seen == set(range(max(length, size)))
    steps = np.diff(found)
    assert (steps > 0).all()
    assert (steps <= max(1, size * (1 - overlap))).all()


def test_blend_network_of_single_pixels_is_not_changed_by_windows():
    whole = planes(1, 150, 97)

    def scores(tiles: torch.Tensor) -> torch.Tensor:
        return torch.cat([tiles, tiles[:, :2] * 2], dim=1).float()

    found = windows.blend(scores, whole, Preprocess(size=SIZE), 0.3)
    torch.testing.assert_close(found, scores(whole[None])[0])


def test_blend_constant_picture_has_no_seam(lively: Segmenter):
    grey = torch.full((3, 3 * SIZE, 2 * SIZE), 90, dtype=torch.uint8)

    def steps(logits: torch.Tensor) -> float:
        return max(logits.diff(dim=axis).abs().max().item() for axis in (1, 2))

    with torch.no_grad():
        one = lively.scores(grey[None, :, :SIZE, :SIZE])[0]
        butted, blended = (
            windows.blend(lively.scores, grey, lively.preprocess, overlap)
            for overlap in (0.0, 0.25)
        )
    assert steps(butted) > 2 * steps(one)
    assert steps(blended) <= 1.01 * steps(one)


def test_predict_large_short_side_is_continued(lively: Segmenter):
    strip = planes(1, SIZE // 2, 3 * SIZE)
    below = strip[:, -1:].expand(3, SIZE // 2, 3 * SIZE)
    whole = lively.predict_large(torch.cat([strip, below], dim=1))
    assert torch.equal(lively.predict_large(strip), whole[: SIZE // 2])


@pytest.mark.parametrize("change", [{"mean": [0.0, 0.0, 0.0]}, {"std": [1.0, 1.0, 1.0]}])
def test_segmenter_inference_normalises_as_the_saved_file_says(
    published: str, change: dict[str, list[float]]
):
    tile = torch.from_numpy(picture(1, SIZE, SIZE).transpose(2, 0, 1).copy())[None]
    before = Segmenter.load(published).logits(tile)
    path = os.path.join(published, FILE)
    with open(path) as stream:
        saved = json.load(stream)
    with open(path, "w") as stream:
        json.dump(saved | change, stream)
    assert not torch.equal(Segmenter.load(published).logits(tile), before)


def test_segmenter_tile_of_another_size_is_refused(published: str):
    with pytest.raises(ValueError, match=r"64 x 64 pixels.*got \(32, 32\)"):
        Segmenter.load(published).predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_segmenter_bare_segformer_is_refused(base: str):
    with pytest.raises(ValueError, match=r"preprocess\.json.*--base"):
        Segmenter.load(base)


def test_segmenter_saved_and_loaded_keeps_preprocessing(published: str):
    assert Segmenter.load(published).preprocess == Preprocess(size=SIZE)


def test_preprocess_other_decoder_is_refused():
    with pytest.raises(ValueError, match="pillow-nearest-0"):
        Preprocess(version="pillow-nearest-0")


def test_preprocess_normalise_takes_mean_to_zero_and_deviation_to_one():
    preprocess = Preprocess(size=32, mean=(0.2, 0.4, 0.6), std=(0.2, 0.4, 0.2))
    colour = torch.tensor([51.0, 204.0, 204.0])  # 0.2, 0.8, 0.8
    tile = colour[None, :, None, None].expand(1, 3, 32, 32)
    assert preprocess.normalise(tile)[0, :, 5, 7].tolist() == pytest.approx([0, 1, 1], abs=1e-5)


def test_preprocess_mask_takes_nearest_colours_and_ignores_the_others():
    colours = np.zeros((96, 96, 3), dtype=np.uint8)  # black: of no class
    colours[:48, :48] = (9, 246, 9)  # near enough
    colours[:48, 48:] = PALETTE[5]  # a car
    colours[48:, :48] = PALETTE[4]
    data = images.encode(colours)
    five = Preprocess(size=32).mask(data)
    assert [five[0, 0], five[0, 31], five[31, 0], five[31, 31]] == [2, IGNORE, 4, IGNORE]
    assert set(np.unique(five)) == {2, 4, IGNORE}  # no colour is mixed at the borders
    assert Preprocess(size=32, num_classes=6).mask(data)[0, 31] == 5


def test_preprocess_map_of_ids_is_no_palette_picture():
    with pytest.raises(BadImage, match="mode L, expected RGB"):
        Preprocess(size=32).mask(images.encode(np.zeros((8, 8), dtype=np.uint8)))


@pytest.mark.parametrize("num_classes", [5, 6])
def test_from_base_other_number_of_classes_gets_a_new_head_only(base: str, num_classes: int):
    net = Segmenter.from_base(base, Preprocess(size=SIZE, num_classes=num_classes)).net
    assert net.decode_head.classifier.weight.shape[0] == num_classes
    before = segformer(150).state_dict()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"decode_head.classifier.weight", "decode_head.classifier.bias"}


def test_from_base_right_number_of_classes_keeps_its_head(tmp_path: os.PathLike):
    segformer(5).save_pretrained(tmp_path)
    kept = Segmenter.from_base(str(tmp_path), Preprocess(size=SIZE)).net.state_dict()
    before = segformer(5).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in kept.items())


def test_from_base_missing_model_says_what_to_download():
    with pytest.raises(ValueError, match=r"--base /nowhere/b3.*hf download.*--base DIR"):
        Segmenter.from_base("/nowhere/b3", Preprocess())


def test_from_base_pickled_weights_are_not_read(base: str, tmp_path: os.PathLike):
    net = segformer(150)
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), os.path.join(tmp_path, "pytorch_model.bin"))
    with pytest.raises(ValueError, match="safetensors"):
        Segmenter.from_base(str(tmp_path), Preprocess())


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("b0", "nvidia/segformer-b0-finetuned-ade-512-512"),
        ("b3", "nvidia/segformer-b3-finetuned-ade-512-512"),
        ("b5", "nvidia/segformer-b5-finetuned-ade-640-640"),
    ],
)
def test_from_base_short_name_is_looked_for_on_the_hub(
    name: str, repository: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(ValueError, match=f"--base {repository}: .*hf download {repository}"):
        Segmenter.from_base(name, Preprocess())


def test_train_segmenter_defaults_are_the_reference_run():
    config = TrainSegmenter()
    assert BASES[config.base] == "nvidia/segformer-b3-finetuned-ade-512-512"
    assert (config.fit.epochs, config.fit.batch, config.fit.schedule) == (60, 6, "plateau")


# Xie et al. 2021: widths and depths from table 6, millions of parameters from table 1 (encoder,
# decoder, and both rounded to one digit; all weights and biases, with the head's 150 classes).
PUBLISHED = {
    "b0": ([32, 64, 160, 256], [2, 2, 2, 2], 256, 3.4, 0.4),
    "b1": ([64, 128, 320, 512], [2, 2, 2, 2], 256, 13.1, 0.6),
    "b2": ([64, 128, 320, 512], [3, 4, 6, 3], 768, 24.2, 3.3),
    "b3": ([64, 128, 320, 512], [3, 4, 18, 3], 768, 44.0, 3.3),
    "b4": ([64, 128, 320, 512], [3, 8, 27, 3], 768, 60.8, 3.3),
    "b5": ([64, 128, 320, 512], [3, 6, 40, 3], 768, 81.4, 3.3),
}


@pytest.mark.parametrize("name", BASES)
def test_segformer_has_the_published_number_of_parameters(name: str):
    widths, depths, head, *millions = PUBLISHED[name]
    sizes = {"hidden_sizes": widths, "depths": depths, "decoder_hidden_size": head}
    heads = {"num_attention_heads": [1, 2, 5, 8]}
    with torch.device("meta"):
        net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150, **sizes, **heads))
    counts = [
        sum(weight.numel() for weight in part.parameters()) / 1e6
        for part in (net.segformer, net.decode_head)
    ]
    assert counts == pytest.approx(millions, abs=0.1)
    assert sum(counts) == pytest.approx(sum(millions), abs=0.1)  # B3: 47.3


def test_cross_entropy_even_logits_are_the_log_of_the_classes():
    mask = torch.tensor([[[0, 4], [IGNORE, 2]]], dtype=torch.uint8)
    loss = cross_entropy(torch.zeros(1, 5, 2, 2), mask, torch.ones(5))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)


def test_cross_entropy_ignored_pixels_have_no_gradient():
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    mask = torch.tensor([[[0, 4], [IGNORE, 2]]], dtype=torch.uint8)
    cross_entropy(logits, mask, torch.ones(5)).backward()
    gradient = logits.grad.abs().sum(1)[0]
    assert gradient[1, 0] == 0
    assert (gradient.flatten()[[0, 1, 3]] > 0).all()


def test_cross_entropy_all_ignored_is_zero_and_finite():
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2, 2), IGNORE, dtype=torch.uint8), torch.ones(5))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


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
        head.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0]))
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


def test_decode_rows_without_map_or_with_error_are_left_out():
    rows = rows_of(**{schema.ERROR: [None, "generate: no", None]})
    rows[schema.CLASSES][0] = None
    decoded = decode(rows, Preprocess(size=32))
    assert decoded["key"].tolist() == [rng.row_key("0000009")]
    assert decoded["tile"].shape == (1, 3, 32, 32)
    assert set(np.unique(decoded["mask"])) == {2}


def test_decode_no_row_left_keeps_shapes_and_types():
    decoded = decode(rows_of(**{schema.CLASSES: [None] * 3}), Preprocess(size=32))
    assert decoded["tile"].shape == (0, 3, 32, 32)
    assert decoded["mask"].dtype == np.uint8
    assert decoded["key"].dtype == np.int64


def test_decode_bad_picture_names_its_pair():
    rows = rows_of()
    rows[schema.CLASSES][1] = b"no picture"
    with pytest.raises(BadImage, match="pair 0000008"):
        decode(rows, Preprocess(size=32))


def test_actor_bad_picture_becomes_its_rows_error_and_leaves_the_others(published: str):
    rows = rows_of(**{schema.ERROR: ["generate: no", None, None]})
    rows[schema.SYNTHETIC][1] = b"no picture"
    done = SegmentAerial(published)(rows)
    maps, errors = done[schema.SYNTHETIC_CLASSES], done[schema.ERROR]
    assert maps[0] is None
    assert errors[0] == "generate: no"
    assert maps[1] is None
    assert errors[1].startswith("segment: synthetic: ")
    assert images.decode_ids(maps[2]).shape == (SIZE, SIZE)
    assert errors[2] is None


def test_actor_windows_give_larger_pictures_maps_of_their_size(published: str):
    size = (SIZE, SIZE)
    sides = (size, (50, 40), (150, 90))  # the segmenter's own, smaller, larger
    pictures = [images.encode(picture(i, *side)) for i, side in enumerate(sides)]
    rows = rows_of(**{schema.SYNTHETIC: pictures})
    plain, cut = (
        [images.decode_ids(data) for data in actor(rows)[schema.SYNTHETIC_CLASSES]]
        for actor in (SegmentAerial(published), SegmentAerial(published, overlap=0.25))
    )
    assert [ids.shape for ids in plain] == [size] * 3
    assert [ids.shape for ids in cut] == [size, size, (150, 90)]
    np.testing.assert_array_equal(plain[:2], cut[:2])
    segmenter = Segmenter.load(published)
    np.testing.assert_array_equal(cut[2], segmenter.predict_large(planes(2, 150, 90)).numpy())


def test_actor_flip_is_that_of_the_segmenter(published: str):
    rows = rows_of(**{schema.SYNTHETIC: [images.encode(picture(i, SIZE, SIZE)) for i in range(3)]})
    maps = SegmentAerial(published, flip=True)(rows)[schema.SYNTHETIC_CLASSES]
    tiles = torch.stack([planes(i) for i in range(3)])
    expected = Segmenter.load(published).predict(tiles, flip=True).numpy()
    np.testing.assert_array_equal([images.decode_ids(data) for data in maps], expected)


@pytest.mark.parametrize("side", [SIZE, 2 * SIZE])
def test_actor_network_that_fails_on_a_row_costs_that_row_only(published: str, side: int):
    def refuse(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if (inputs[0].flatten(2).std(dim=2) < 1e-6).all(dim=1).any():
            raise RuntimeError("a picture of one colour")

    pictures = [picture(i, side, side) for i in range(3)]
    pictures[1][:] = 7
    rows = rows_of(**{schema.SYNTHETIC: [images.encode(p) for p in pictures]})
    actor = SegmentAerial(published, overlap=0.25)
    whole = actor(rows)[schema.SYNTHETIC_CLASSES]
    actor.segmenter.net.register_forward_pre_hook(refuse)
    done = actor(rows)
    assert done[schema.ERROR][1] == "segment: RuntimeError: a picture of one colour"
    assert done[schema.SYNTHETIC_CLASSES].tolist() == [whole[0], None, whole[2]]
    assert done[schema.ERROR][[0, 2]].tolist() == [None, None]


def test_actor_windows_bad_picture_fails_alone(published: str):
    rows = rows_of()
    rows[schema.SYNTHETIC][0] = b"no picture"
    done = SegmentAerial(published, overlap=0.25)(rows)
    assert done[schema.ERROR][0].startswith("segment: synthetic: ")
    assert done[schema.ERROR][1:].tolist() == [None, None]
    assert images.decode_ids(done[schema.SYNTHETIC_CLASSES][2]).shape == (90, 70)


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_segment_overlap_outside_its_range_is_refused(overlap: float):
    with pytest.raises(ValueError, match=r"overlap is a share in \[0, 1\)"):
        Segment(overlap=overlap)


def test_segment_help_of_model_asks_for_a_local_directory(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        configs.parse(Segment, ["--help"])
    asked = capsys.readouterr().out.partition("--model")[2].partition("--source")[0]
    assert "Local directory" in asked


def test_actor_all_rows_failed_passes_them_through(published: str):
    done = SegmentAerial(published)(rows_of(**{schema.SYNTHETIC: [None] * 3}))
    assert done[schema.SYNTHETIC_CLASSES].tolist() == [None] * 3
    assert all("empty" in error for error in done[schema.ERROR])


def test_actor_missing_column_is_refused(published: str):
    rows = rows_of()
    del rows[schema.SYNTHETIC]
    with pytest.raises(ValueError, match=r"segment: expected columns \['synthetic'\]"):
        SegmentAerial(published)(rows)


def test_synthesized_rows_show_a_with_the_true_map():
    taken = synthesized(rows_of(), share=1.0)
    decoded = decode(taken, Preprocess(size=32))
    np.testing.assert_array_equal(
        decoded["tile"][0], Preprocess(size=32).tile(images.encode(picture(9)))
    )
    assert [mask.max() for mask in decoded["mask"]] == [0, 1, 2]
    true = decode(rows_of(), Preprocess(size=32))
    assert not set(decoded["key"]) & set(true["key"])


def test_synthesized_share_is_of_the_rows_and_the_same_in_any_batch():
    names = [f"{number:07d}" for number in range(2000)]
    columns = (schema.SYNTHETIC, schema.CLASSES, schema.ERROR)
    rows = {name: np.full(2000, None, dtype=object) for name in columns}
    rows[schema.PAIR_ID] = np.array(names, dtype=object)
    taken = synthesized(rows, share=0.3)[schema.PAIR_ID].tolist()
    assert 0.25 < len(taken) / 2000 < 0.35  # four standard deviations
    halves = [{k: v[part] for k, v in rows.items()} for part in (slice(700), slice(700, None))]
    again = [name for half in halves for name in synthesized(half, share=0.3)[schema.PAIR_ID]]
    assert again == taken
    assert synthesized(rows, share=0.3, seed=1)[schema.PAIR_ID].tolist() != taken


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_train_segmenter_share_outside_its_range_is_refused(share: float):
    with pytest.raises(ValueError, match=r"synthesized_share is a share in \(0, 1\]"):
        TrainSegmenter(synthesized_share=share)


def make_pairs(root: str, maps: bool, count: int = 4) -> None:
    """Pairs in the layout of CVUSA's subset: all but the last to train on, that one held out."""
    for folder in ("bingmap", "streetview", "segmap"):
        os.makedirs(os.path.join(root, folder))
    for number in range(1, count + 1):
        name = f"{number:07d}"
        ids = np.full((80, 80), number % 5, dtype=np.uint8)
        files = {
            f"bingmap/input{name}.png": images.encode(picture(number, 80, 80)),
            f"streetview/{name}.jpg": images.encode(picture(number, 56, 308), "JPEG"),
        } | ({f"segmap/output{name}.png": images.encode(images.colours_of(ids))} if maps else {})
        for path, data in files.items():
            with open(os.path.join(root, path), "wb") as stream:
                stream.write(data)
    for split, numbers in (("train", range(1, count)), ("val", (count,))):
        with open(os.path.join(root, f"{split}-19zl.csv"), "w") as table:
            for number in numbers:
                ground = f"streetview/input{number:07d}.png"
                table.write(f"bingmap/input{number:07d}.png,{ground},{ground}\n")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_train_publishes_a_segmenter_that_infers_at_its_training_size(
    base: str, tmp_path: os.PathLike, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    make_pairs("pairs", maps=True)
    config = TrainSegmenter(
        data=Ingest(root="pairs"),
        base=os.path.relpath(base),
        size=SIZE,
        class_weights=True,
        dice=0.5,
        fit=Fit(epochs=1, batch=2, schedule="plateau", cache=True, name="segmenter"),
    )
    result = train(config)
    assert 0 <= result.metrics["val/miou"] <= 1
    assert result.metrics["lr/1"] == pytest.approx(10 * result.metrics["lr"])
    row = rows_of()
    found = SegmentAerial("models/segmenter", schema.AERIAL)(row)[schema.SYNTHETIC_CLASSES][0]
    assert images.decode_ids(found).shape == (SIZE, SIZE)
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("cvmatch")
    assert experiment
    run = client.search_runs([experiment.experiment_id], "tags.stage = 'segment'", max_results=1)[0]
    assert "masks.png" in [file.path for file in client.list_artifacts(run.info.run_id)]
    with open("pairs/bingmap/input0000001.png", "wb") as stream:
        stream.write(images.encode(picture(1, 96, 96)))
    with pytest.raises(ValueError, match="rows made from"):  # of the same name and place
        train(config)


def write_synthesized(output: str, count: int, split: str) -> None:
    """Grey synthetic aerials with maps of class 4, in the form that jobs/synthesize.py writes."""
    colours = images.colours_of(np.full((SIZE, SIZE), 4, dtype=np.uint8))
    grey = images.encode(np.full((SIZE, SIZE, 3), 128, dtype=np.uint8))
    names = [f"{number:07d}" for number in range(1, count + 1)]
    columns = {schema.PAIR_ID: names, schema.SYNTHETIC: [grey] * count}
    columns[schema.CLASSES] = [images.encode(colours)] * count
    os.makedirs(output)
    parquet.write_table(
        schema.conform(pa.table(columns)), os.path.join(output, "0.parquet"), row_group_size=8
    )
    made = Synthesize(data=Ingest(split=split))
    manifest.write(output, rows=count, config=made, models={}, source="pairs")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_training_rows_come_once_and_synthetic_ones_between_the_true(tmp_path: os.PathLike):
    output = os.path.join(tmp_path, "synthesized")
    write_synthesized(output, 24, "train")
    root = os.path.join(tmp_path, "pairs")
    make_pairs(root, maps=True, count=25)
    config = TrainSegmenter(data=Ingest(root=root, block=8), synthesized=output)
    rows = training_rows(config, PairDataset.open(config.data), Preprocess(size=SIZE))
    assert rows.count() == 48
    drawn = [bool((row["tile"] == 128).all()) for row in rows.take_all()]
    assert sum(drawn) == 24
    assert sum(drawn[:24]) == pytest.approx(12, abs=4)  # blocks of 8 take turns


def test_training_rows_of_another_split_are_refused(tmp_path: os.PathLike):
    output = os.path.join(tmp_path, "synthesized")
    write_synthesized(output, 2, "val")
    config = TrainSegmenter(synthesized=output)
    with pytest.raises(ValueError, match=r"expected rows of the split 'train'.*got 'val'"):
        training_rows(config, PairDataset.open(config.data), Preprocess(size=SIZE))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_labelled_no_class_map_says_so(tmp_path: os.PathLike):
    root = os.path.join(tmp_path, "pairs")
    make_pairs(root, maps=False)
    with pytest.raises(ValueError, match="expected rows with a class map, got none"):
        labelled(PairDataset.open(Ingest(root=root)), Preprocess(size=SIZE), Fit())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_segment_rows_keep_their_ids_and_gain_their_own_maps(published: str):
    rows = rows_of()
    stream = ray.data.from_items(
        [
            {name: rows[name][i] for name in rows if name != schema.ERROR} | {schema.ERROR: None}
            for i in range(3)
        ]
    )
    config = Segment(model=published, source="aerial", pool=Pool(batch=2, cpus=0.5))
    found = {row[schema.PAIR_ID]: row for row in segment(stream, config).take_all()}
    expected = SegmentAerial(published, "aerial")(rows)[schema.SYNTHETIC_CLASSES]
    assert [found[name][schema.SYNTHETIC_CLASSES] for name in rows[schema.PAIR_ID]] == list(
        expected
    )
    assert all(row[schema.ERROR] is None for row in found.values())
