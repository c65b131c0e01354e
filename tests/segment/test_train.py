"""Training of the segmenter from rows to a published model."""

import dataclasses
import os
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient
from pyarrow import parquet

from cvmatch.data import images, manifest, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.runtime import tracking
from cvmatch.segment.batches import Preprocess
from cvmatch.segment.infer import SegmentAerial
from cvmatch.segment.settings import TrainSegmenter
from cvmatch.segment.train import (
    COUNTED,
    check_labels,
    check_synthesized,
    measure,
    read_labelled,
    read_training_rows,
    train,
)
from cvmatch.synthesize.settings import Synthesize
from cvmatch.training.settings import TrainConfig
from tests.helpers.segmenter import SIZE, picture, rows_of


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
        dice_weight=0.5,
        fit=TrainConfig(epochs=1, batch=2, schedule="plateau", cache=True, name="segmenter"),
    )
    result = train(config)
    assert 0 <= result.metrics["val/miou"] <= 1
    unseen = dataclasses.replace(config, val=config.held_out)
    assert measure(unseen, result.checkpoint)["val/miou"] == result.metrics["val/miou"]
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
    with pytest.raises(ValueError, match="input_fingerprint: "):  # of the same name and place
        train(config)


def write_synthesized(output: str, count: int, split: Literal["train", "val"]) -> None:
    """Grey synthetic aerials with maps of class 4, in the form that cvmatch synthesize writes."""
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
    rows = read_training_rows(config, PairDataset.open(config.data), Preprocess(size=SIZE))
    assert rows.count() == 48
    drawn = [bool((row["aerial"] == 128).all()) for row in rows.take_all()]
    assert sum(drawn) == 24
    assert sum(drawn[:24]) == pytest.approx(12, abs=4)  # blocks of 8 take turns


@pytest.mark.ray
def test_training_rows_of_another_split_are_refused(ray_session, tmp_path: os.PathLike):
    output, root = (os.path.join(tmp_path, name) for name in ("synthesized", "pairs"))
    write_synthesized(output, 2, "val")
    make_pairs(root, maps=True, count=4)
    config = TrainSegmenter(data=Ingest(root=root), synthesized=output)
    with pytest.raises(ValueError, match=r"expected rows of the split 'train'.*got 'val'"):
        check_synthesized(config)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_labelled_no_class_map_says_so(tmp_path: os.PathLike):
    root = os.path.join(tmp_path, "pairs")
    make_pairs(root, maps=False)
    with pytest.raises(ValueError, match="expected rows with a class map, got none"):
        read_labelled(PairDataset.open(Ingest(root=root)), Preprocess(size=SIZE), TrainConfig())


def test_labels_that_say_nothing_are_refused_and_few_are_told(caplog):
    nothing = np.full((8, 8), schema.IGNORE, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"pairs \(train\): of 2 class maps, 0\.0%.*learn from"):
        check_labels([nothing, nothing], Ingest(root="pairs"))
    few = nothing.copy()
    few[0] = 2
    check_labels([nothing, few], Ingest(root="pairs"))
    assert "6.2% of the pixels" in caplog.text
    caplog.clear()
    check_labels([np.zeros_like(nothing)], Ingest(root="pairs"))
    assert not caplog.text


def test_labels_are_looked_for_until_one_is_found():
    nothing = np.full((1, 1), schema.IGNORE, dtype=np.uint8)
    check_labels([nothing] * 2 * COUNTED + [nothing * 0], Ingest(root="pairs"))
