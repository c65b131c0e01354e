"""Settings of a run that a test changes."""

import pytest

from cvmatch.training.settings import TrainConfig


@pytest.fixture
def fit(tmp_path):
    return TrainConfig(epochs=3, batch=8, storage=str(tmp_path / "runs"), shuffle=64)
