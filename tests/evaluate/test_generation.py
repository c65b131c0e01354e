import math

import numpy as np
import pytest

from cvmatch.data import images, schema
from cvmatch.evaluate.generation import measure_generation, measure_segmentation
from tests.helpers import index as tiny
from tests.helpers.present import present


def pictures(count, drawn):
    return [
        {schema.SYNTHETIC: drawn(number), schema.AERIAL: tile(number)} for number in range(count)
    ]


def tile(number):
    return images.encode(tiny.picture(np.random.default_rng(number), 128, 128))


def recalls(result):
    return present(result).retrieval["luminance"].recalls


def test_generation_of_the_tiles_themselves_is_perfect_and_shuffled_is_not():
    result = present(measure_generation(pictures(12, tile), bootstrap=50))
    assert result.similarity["ncc"] == pytest.approx(1.0, abs=1e-5)
    assert result.similarity["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert (
        recalls(result)["recall@1"].value,
        recalls(result)["recall@1"].low,
    ) == (1.0, 1.0)
    assert result.similarity["ncc_shuffled"] < 0.3
    assert result.similarity["ssim_shuffled"] < 0.5


def test_generation_of_one_picture_for_all_is_not_above_chance():
    result = measure_generation(pictures(12, lambda _: tile(99)), bootstrap=50)
    assert recalls(result)["recall@1"].value <= 1 / 12
    grey = images.encode(np.full((128, 128, 3), 90, dtype=np.uint8))
    grey_result = measure_generation(pictures(12, lambda _: grey), bootstrap=50)
    assert recalls(grey_result)["recall@1"].value == recalls(grey_result)["recall@10%"].value == 0.0


def test_generation_in_blocks_equals_one_block(monkeypatch):
    def half(number):
        clear = images.decode(tile(number)).astype(int) + images.decode(tile(number + 50))
        return images.encode((clear // 2).astype(np.uint8))

    whole = present(measure_generation(pictures(11, half), bootstrap=20))
    monkeypatch.setattr("cvmatch.evaluate.generation._CHUNK", 4)
    assert measure_generation(pictures(11, half), bootstrap=20) == whole
    assert (
        whole.retrieval["luminance"].recalls["recall@1"].low
        <= whole.retrieval["luminance"].recalls["recall@1"].value
        <= whole.retrieval["luminance"].recalls["recall@1"].high
    )


def test_generation_without_pictures_is_none():
    assert measure_generation([{schema.SYNTHETIC: None, schema.AERIAL: tile(0)}]) is None


def test_segmentation_counts_agreement_by_hand():
    truth = np.zeros((4, 8), dtype=np.uint8)
    truth[:, 4:] = 3
    coloured = images.colours_of(truth)
    coloured[0, 0] = (255, 255, 0)  # a car: ignored among five classes
    ids = np.zeros((2, 4), dtype=np.uint8)  # half the resolution
    ids[:, 3] = 3
    rows = [
        {schema.CLASSES: images.encode(coloured), schema.SYNTHETIC_CLASSES: images.encode(ids)},
        {schema.CLASSES: None, schema.SYNTHETIC_CLASSES: images.encode(ids)},
    ]
    result = present(measure_segmentation(rows))
    # Of 31 counted pixels 15 are class 0 (all right) and 16 class 3 (8 right, 8 called 0).
    assert result.accuracy == pytest.approx(23 / 31)
    assert result.iou["impervious"] == pytest.approx(15 / 23)
    assert result.iou["building"] == pytest.approx(0.5)
    assert math.isnan(result.iou["tree"])
    assert result.miou == pytest.approx((15 / 23 + 0.5) / 2)
    assert result.ignored == pytest.approx(1 / 32)


def test_segmentation_of_the_true_maps_beats_shuffled():
    result = present(measure_segmentation(tiny.rows(6).to_pylist()))
    assert result.miou == 1.0
    assert result.miou_shuffled < 0.5
