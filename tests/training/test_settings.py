"""Settings of a training run: what cannot be is refused."""

import pytest

from cvmatch import config as configs
from cvmatch.training.settings import TrainConfig


def test_fit_refuses_a_batch_that_workers_cannot_share():
    with pytest.raises(ValueError, match=r"3 workers can share evenly, got 8.*--fit.batch 9"):
        TrainConfig(batch=8, workers=3)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"accumulate": 0}, {"workers": -1}, {"warmup": 1.0}]
)
def test_fit_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match="fit: "):
        TrainConfig(**wrong)


def test_fit_reads_back_from_its_dump(tmp_path):
    before = TrainConfig(schedule="plateau", best="val/loss", clip_norm=0.5)
    (tmp_path / "fit.yaml").write_text(configs.dump(before))
    assert configs.parse(TrainConfig, ["--config", str(tmp_path / "fit.yaml")]) == before
