"""One preprocessing of pictures and masks; rows become tensors."""

import numpy as np
import pytest
import torch

from cvmatch.data import images, schema
from cvmatch.data.images import BadImage
from cvmatch.data.schema import IGNORE, PALETTE
from cvmatch.nn import rng
from cvmatch.segment.batches import Preprocess, decode, select_synthesized
from tests.helpers.segmenter import picture, rows_of


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


def test_decode_rows_without_map_or_with_error_are_left_out():
    rows = rows_of(**{schema.ERROR: [None, "generate: no", None]})
    rows[schema.CLASSES][0] = None
    decoded = decode(rows, Preprocess(size=32))
    assert decoded["key"].tolist() == [rng.row_key("0000009")]
    assert decoded["aerial"].shape == (1, 3, 32, 32)
    assert set(np.unique(decoded["aerial_mask"])) == {2}


def test_decode_no_row_left_keeps_shapes_and_types():
    decoded = decode(rows_of(**{schema.CLASSES: [None] * 3}), Preprocess(size=32))
    assert decoded["aerial"].shape == (0, 3, 32, 32)
    assert decoded["aerial_mask"].dtype == np.uint8
    assert decoded["key"].dtype == np.int64


def test_decode_bad_picture_names_its_pair():
    rows = rows_of()
    rows[schema.CLASSES][1] = b"no picture"
    with pytest.raises(BadImage, match="pair 0000008"):
        decode(rows, Preprocess(size=32))


def test_synthesized_rows_show_a_with_the_true_map():
    taken = select_synthesized(rows_of(), share=1.0)
    decoded = decode(taken, Preprocess(size=32))
    np.testing.assert_array_equal(
        decoded["aerial"][0], Preprocess(size=32).tile(images.encode(picture(9)))
    )
    assert [mask.max() for mask in decoded["aerial_mask"]] == [0, 1, 2]
    true = decode(rows_of(), Preprocess(size=32))
    assert not set(decoded["key"]) & set(true["key"])


def test_synthesized_share_is_of_the_rows_and_the_same_in_any_batch():
    names = [f"{number:07d}" for number in range(2000)]
    columns = (schema.SYNTHETIC, schema.CLASSES, schema.ERROR)
    rows = {name: np.full(2000, None, dtype=object) for name in columns}
    rows[schema.PAIR_ID] = np.array(names, dtype=object)
    taken = select_synthesized(rows, share=0.3)[schema.PAIR_ID].tolist()
    assert 0.25 < len(taken) / 2000 < 0.35  # four standard deviations
    halves = [{k: v[part] for k, v in rows.items()} for part in (slice(700), slice(700, None))]
    again = [
        name for half in halves for name in select_synthesized(half, share=0.3)[schema.PAIR_ID]
    ]
    assert again == taken
    assert select_synthesized(rows, share=0.3, seed=1)[schema.PAIR_ID].tolist() != taken
