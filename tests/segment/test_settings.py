"""Settings of the segmenter."""

import pytest

from cvmatch.segment.model import BASES
from cvmatch.segment.settings import TrainSegmenter


def test_train_segmenter_defaults_are_the_reference_run():
    config = TrainSegmenter()
    assert BASES[config.base] == "nvidia/segformer-b3-finetuned-ade-512-512"
    assert (config.fit.epochs, config.fit.batch, config.fit.schedule) == (60, 6, "plateau")


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_train_segmenter_share_outside_its_range_is_refused(share: float):
    with pytest.raises(ValueError, match=r"synthesized_share is a share in \(0, 1\]"):
        TrainSegmenter(synthesized_share=share)
