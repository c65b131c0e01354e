"""Synthesized rows become tensors."""

from cvmatch.match.batches import decode_batch
from cvmatch.nn import rng
from tests.helpers.matcher import (
    HIGH,
    SIZE,
    WIDE,
    columns,
    row,
)


def test_decode_leaves_failed_rows_out_and_keeps_ids_of_classes():
    batch = decode_batch(
        columns(row("a"), row("b", error="broken", ground=None), row("c", shade=3)),
        panorama=(HIGH, WIDE),
        tile_size=SIZE,
    )
    assert batch["key"].tolist() == [rng.row_key("a"), rng.row_key("c")]
    assert batch["ground"].shape == (2, 3, HIGH, WIDE)
    assert (batch["aerial"][1] == 3).all()
    assert (batch["synthetic_mask"] == 2).all()


def test_decode_of_failed_rows_only_gives_empty_tensors():
    batch = decode_batch(columns(row(error="broken")), panorama=(HIGH, WIDE), tile_size=SIZE)
    assert batch["synthetic"].shape == (0, 3, SIZE, SIZE)
    assert batch["synthetic_mask"].shape == (0, SIZE, SIZE)
