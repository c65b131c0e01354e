"""Segmenters that the tests of this folder share."""

import os

import pytest

from cvmatch.segment.batches import Preprocess
from cvmatch.segment.model import Segmenter
from cvmatch.segment.settings import TrainSegmenter
from cvmatch.segment.task import SegmenterTask
from tests.helpers.segmenter import SIZE, segformer


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
