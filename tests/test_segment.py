"""Segmenter: one preprocessing for training and inference, loss at the mask's resolution, rows."""

import json
import math
import os

import numpy as np
import pytest
import ray.data
import torch
from mlflow import MlflowClient
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cvmatch import draws, images, metrics, schema, tracking
from cvmatch.engine import Pool
from cvmatch.images import BadImage
from cvmatch.ingest import Ingest
from cvmatch.schema import IGNORE, PALETTE
from cvmatch.segment.infer import Segment, SegmentAerial, segment
from cvmatch.segment.model import Segmenter, enlarge
from cvmatch.segment.pairs import FILE, Preprocess, decode
from cvmatch.segment.train import (
    SegmenterTask,
    TrainSegmenter,
    augment,
    class_weights,
    cross_entropy,
    dice,
    labelled,
    train,
)
from cvmatch.training import Fit

SIZE = 64


def segformer(num_labels: int, **sizes: list[int]) -> SegformerForSemanticSegmentation:
    """A SegFormer of 8 to 16 channels, without dropout so that two passes agree."""
    small = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4}
    dry = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "decoder_hidden_size": 16}
    torch.manual_seed(0)
    return SegformerForSemanticSegmentation(
        SegformerConfig(num_labels=num_labels, **{**small, **dry, **sizes})
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


def test_segformer_b3_has_the_published_size():
    sizes = {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 18, 3]}
    heads = {"num_attention_heads": [1, 2, 5, 8], "decoder_hidden_size": 768}
    with torch.device("meta"):
        net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150, **sizes, **heads))
    millions = {
        name: sum(weight.numel() for weight in part.parameters()) / 1e6
        for name, part in net.named_children()
    }
    # Xie et al. 2021, table 1: 44.0 M encoder, 3.3 M decoder, 47.3 M in all.
    assert millions["segformer"] == pytest.approx(44.0, abs=0.2)
    assert sum(millions.values()) == pytest.approx(47.3, abs=0.2)


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
    keys = torch.tensor([draws.key(name) for name in ("0000001", "0000002", "0000003")])
    lots = draws.uniform(keys, draws.stream(0, 3, "segment"), 5)
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
    assert decoded["key"].tolist() == [draws.key("0000009")]
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


def test_actor_all_rows_failed_passes_them_through(published: str):
    done = SegmentAerial(published)(rows_of(**{schema.SYNTHETIC: [None] * 3}))
    assert done[schema.SYNTHETIC_CLASSES].tolist() == [None] * 3
    assert all("empty" in error for error in done[schema.ERROR])


def test_actor_missing_column_is_refused(published: str):
    rows = rows_of()
    del rows[schema.SYNTHETIC]
    with pytest.raises(ValueError, match=r"segment: expected columns \['synthetic'\]"):
        SegmentAerial(published)(rows)


def make_pairs(root: str, maps: bool) -> None:
    """Four pairs in the layout of CVUSA's subset: three to train on, one held out."""
    for folder in ("bingmap", "streetview", "segmap"):
        os.makedirs(os.path.join(root, folder))
    for number in range(1, 5):
        name = f"{number:07d}"
        ids = np.full((80, 80), number % 5, dtype=np.uint8)
        files = {
            f"bingmap/input{name}.png": images.encode(picture(number, 80, 80)),
            f"streetview/{name}.jpg": images.encode(picture(number, 56, 308), "JPEG"),
        } | ({f"segmap/output{name}.png": images.encode(images.colours_of(ids))} if maps else {})
        for path, data in files.items():
            with open(os.path.join(root, path), "wb") as stream:
                stream.write(data)
    for split, numbers in (("train", (1, 2, 3)), ("val", (4,))):
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
        fit=Fit(epochs=1, batch=2, schedule="plateau", cache=True),
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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_labelled_no_class_map_says_so(tmp_path: os.PathLike):
    root = os.path.join(tmp_path, "pairs")
    make_pairs(root, maps=False)
    with pytest.raises(ValueError, match="expected rows with a class map, got none"):
        labelled(Ingest(root=root), Preprocess(size=SIZE), Fit())


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
