"""Rows of pairs as tensors, and their augmentation."""

import numpy as np
import pytest
import torch

from cvmatch.data import images, schema
from cvmatch.generate.batches import ImageSizes, augment, decode_pairs
from cvmatch.nn import rng
from tests.helpers.generator import PANORAMA, make_rows, raw_batch


def test_decode_pairs_leaves_failed_rows_out_and_keys_the_rest():
    rows = {name: values[[0, 2]] for name, values in make_rows().items()}
    out = decode_pairs(rows, ImageSizes(PANORAMA, 32, 8))
    assert out["key"].tolist() == [rng.row_key("0000000")]
    assert out["ground"].shape == (1, 3, *PANORAMA)
    assert out["aerial"].shape == (1, 3, 32, 32)
    assert (out["aerial_mask"] == schema.IGNORE).all()  # it has no map
    assert out["aerial_mask"].shape == (1, 32, 32)
    np.testing.assert_array_equal(out["ground"], raw_batch(1)["ground_view"].numpy())
    nothing = decode_pairs({k: v[1:] for k, v in rows.items()}, ImageSizes(PANORAMA, 32, 8))
    assert nothing["ground"].shape == (0, 3, *PANORAMA)


def test_decode_pairs_reads_class_maps_by_their_colours_cars_too():
    ids = np.arange(len(schema.PALETTE)).repeat(8)[:, None].repeat(48, axis=1).astype(np.uint8)
    ids[:8, :8] = schema.IGNORE
    rows = {name: values[[0, 0]] for name, values in make_rows().items()}
    rows[schema.CLASSES][0] = images.encode(images.colours_of(ids))
    out = decode_pairs(rows, ImageSizes(PANORAMA, 48, 12))["aerial_mask"]
    np.testing.assert_array_equal(out[0], ids)
    assert (out[1] == schema.IGNORE).all()


def test_decode_pairs_stops_at_a_picture_that_ingest_let_through():
    with pytest.raises(images.BadImage):
        decode_pairs(make_rows(), ImageSizes(PANORAMA, 64, 16))


def test_augment_mirrors_view_tile_and_mask_together():
    batch = raw_batch(8)
    batch["aerial_mask"] = batch["aerial"][:, 0]
    pairs = augment(batch, mirror=True, seed=0)
    assert 0 < pairs.mirrored.sum() < 8
    assert torch.equal(pairs.mask, (pairs.tile[:, 0] * 255).round().byte())
    rows = pairs.mirrored[:, None, None, None]
    views = torch.where(rows, batch["ground_view_mirrored"], batch["ground_view"])
    torch.testing.assert_close(pairs.ground_view, views.float() / 255)
    assert torch.equal(augment(batch, mirror=False, seed=0).mask, batch["aerial_mask"])
