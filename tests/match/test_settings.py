"""Settings of the matcher that cannot be are refused."""

import pytest

from cvmatch.match.settings import TrainMatcher
from cvmatch.training.settings import TrainConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"direct_weight": -1.0}, "direct_weight of at least 0"),
        ({"branches": ("direct", "direct")}, "each branch once"),
        ({"branches": ("layout",)}, "nothing to train"),
        ({"modality_dropout": (0.0, 1.5, 0.0)}, "shares in"),
        ({"panorama": (64, 250)}, "multiple of 4"),
        ({"chunk": -1}, "chunk of at least 0"),
        (
            {"hard_negatives_every": 2, "fit": TrainConfig(storage="s3://bucket/runs")},
            "that all nodes mount",
        ),
    ],
)
def test_recipe_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainMatcher(**wrong)
