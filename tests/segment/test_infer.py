"""Actors that segment rows."""

import numpy as np
import pytest
import ray.data
import torch

from cvmatch import config as configs
from cvmatch.data import images, schema
from cvmatch.runtime.settings import Pool
from cvmatch.segment.batches import decode
from cvmatch.segment.infer import SegmentAerial, segment
from cvmatch.segment.model import Segmenter, upsample
from cvmatch.segment.settings import Segment
from cvmatch.segment.task import SegmenterTask
from tests.helpers.segmenter import SIZE, picture, planes, rows_of


def test_segmenter_training_and_inference_give_equal_logits(task: SegmenterTask, published: str):
    rows = rows_of()
    decoded = decode(rows, task.segmenter.preprocess)
    task.eval()
    with torch.no_grad():
        trained = task.segmenter.logits(torch.from_numpy(decoded["aerial"]).float())
    actor = SegmentAerial(published, schema.AERIAL)
    tiles = np.stack([actor.segmenter.preprocess.tile(data) for data in rows[schema.AERIAL]])
    with torch.no_grad():
        inferred = actor.segmenter.logits(torch.from_numpy(tiles))
    torch.testing.assert_close(inferred, trained, rtol=0, atol=0)
    expected = upsample(trained, SIZE).argmax(1).numpy()
    found = [images.decode_ids(data) for data in actor(rows)[schema.SYNTHETIC_CLASSES]]
    np.testing.assert_array_equal(np.stack(found), expected)


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
    actor = SegmentAerial(published)
    whole = actor(rows)[schema.SYNTHETIC_CLASSES]
    actor.segmenter.net.register_forward_pre_hook(refuse)
    done = actor(rows)
    assert done[schema.ERROR][1] == "segment: RuntimeError: a picture of one colour"
    assert done[schema.SYNTHETIC_CLASSES].tolist() == [whole[0], None, whole[2]]
    assert done[schema.ERROR][[0, 2]].tolist() == [None, None]


def test_segment_help_of_model_asks_for_a_directory(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        configs.parse(Segment, ["--help"])
    asked = capsys.readouterr().out.partition("--model")[2].partition("--source")[0]
    assert "Directory or URI" in asked


def test_actor_all_rows_failed_passes_them_through(published: str):
    done = SegmentAerial(published)(rows_of(**{schema.SYNTHETIC: [None] * 3}))
    assert done[schema.SYNTHETIC_CLASSES].tolist() == [None] * 3
    assert all("empty" in error for error in done[schema.ERROR])


def test_actor_missing_column_is_refused(published: str):
    rows = rows_of()
    del rows[schema.SYNTHETIC]
    with pytest.raises(ValueError, match=r"segment: expected columns \['synthetic'\]"):
        SegmentAerial(published)(rows)


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
