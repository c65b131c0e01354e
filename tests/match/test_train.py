"""Training of the matcher from rows to a published model."""

from pathlib import Path

import pytest
import ray.data
import torch

from cvmatch import config as configs
from cvmatch.data import storage
from cvmatch.demo import models as base_models
from cvmatch.match.heads.branches import LAYOUT_WIDTH, FusionWeights
from cvmatch.match.infer import embed_tiles
from cvmatch.match.settings import Embed, TrainMatcher
from cvmatch.match.task import read_training_ids
from cvmatch.match.train import build_task, measure, train
from cvmatch.nn.backbones import Tower, save_tower
from cvmatch.runtime.streams.output_directory import PROVENANCE
from cvmatch.training.settings import TrainConfig
from tests.helpers.matcher import (
    HIGH,
    SIZE,
    SPEC,
    WIDE,
    joint_heads,
    rows,
    synthesized_rows,
)
from tests.helpers.present import present

CONFIGS = Path(__file__).parents[2] / "configs"


def test_config_of_sample4geo_trains_a_shared_tower_without_a_and_s(tmp_path):
    save_tower(Tower(SPEC), str(tmp_path))
    words = ["--config", str(CONFIGS / "sample4geo.yaml"), "--tower", str(tmp_path)]
    task = build_task(configs.parse(TrainMatcher, words)).train()
    pictures = torch.randint(0, 256, (3, 3, 384, 384), dtype=torch.uint8)
    ground = torch.randint(0, 256, (3, 3, 140, 768), dtype=torch.uint8)
    batch = {"ground": ground, "aerial": pictures, "key": torch.arange(3), "epoch": torch.tensor(0)}
    task(batch)["loss"].backward()
    assert task.model.ground_tower is None
    assert all(present(weight.grad).any() for weight in task.model.aerial_tower.parameters())


def test_config_of_the_prototype_learns_from_joint_triplets_alone(tmp_path):
    save_tower(Tower(SPEC), str(tmp_path))
    words = ["--config", str(CONFIGS / "prototype.yaml"), "--tower", str(tmp_path)]
    words += ["--panorama", str(HIGH), str(WIDE), "--tile-size", str(SIZE)]
    task = build_task(configs.parse(TrainMatcher, words)).train()
    losses = task(rows(4))
    assert losses["loss"].item() == losses["joint"].item()
    assert not task.log_scale
    losses["loss"].backward()
    grad = present(joint_heads(task.model).query_linear.weight.grad)
    assert all(part.any() for part in grad.split(SPEC.dim, dim=1))  # of G, of A and of S


@pytest.mark.ray
def test_train_publishes_a_model_that_beats_chance_and_knows_its_pairs(
    tmp_path, monkeypatch, ray_session
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_tower(Tower(SPEC), str(tmp_path / "tower"))
    config = TrainMatcher(
        pairs=synthesized_rows(str(tmp_path / "pairs"), [f"t{i:02}" for i in range(64)]),
        val=synthesized_rows(str(tmp_path / "val"), [f"v{i}" for i in range(8)]),
        tower=str(tmp_path / "tower"),
        panorama=(HIGH, WIDE),
        tile_size=SIZE,
        hidden=16,
        loss="triplet",
        augment=False,
        lr_towers=1e-2,
        lr_heads=1e-2,
        output=str(tmp_path / "model"),
        fit=TrainConfig(
            epochs=6, batch=8, cache=True, storage=str(tmp_path / "runs"), name="matcher"
        ),
    )
    result = train(config)
    # At chance all scores of a batch are equal, and each of the two terms is the margin.
    assert result.metrics is not None
    assert result.metrics["val/direct"] < config.margin / 2
    validated = {name: v for name, v in result.metrics.items() if name.startswith("val/")}
    assert measure(config, result.checkpoint) == pytest.approx(validated, abs=1e-6)
    weights = FusionWeights.load(config.output)
    assert weights.pairs == 8
    assert set(weights.weights["G+A"]) == {"direct", "layout"}
    assert read_training_ids(config.output) == {f"t{i:02}" for i in range(64)}
    tiles = embed_tiles(ray.data.read_parquet(config.val), Embed(model=config.output))
    found = tiles.take_all()
    assert [item["error"] is None for item in found].count(False) == 1
    assert found[0]["tile_vector"].shape == (16 + LAYOUT_WIDTH,)
    assert train(config).metrics == result.metrics  # a finished run is taken as it is
    storage.write_json(storage.join(config.pairs, PROVENANCE), {"sampling": {"steps": 50}})
    with pytest.raises(ValueError, match="input_fingerprint: "):
        train(config)


@pytest.mark.slow
@pytest.mark.ray
def test_train_with_two_workers_and_near_pairs_in_a_batch_runs_to_its_end(
    tmp_path, monkeypatch, ray_session
):
    monkeypatch.chdir(tmp_path)
    save_tower(Tower(SPEC), str(tmp_path / "tower"))
    config = TrainMatcher(
        pairs=synthesized_rows(str(tmp_path / "pairs"), [f"t{i:02}" for i in range(32)], towns=4),
        tower="tower",  # the workers are in another directory
        weights="tower/model.safetensors",
        panorama=(HIGH, WIDE),
        tile_size=SIZE,
        hidden=16,
        hard_negatives_every=2,
        chunk=4,
        output=str(tmp_path / "model"),
        fit=TrainConfig(epochs=3, batch=16, workers=2, storage=str(tmp_path / "runs"), name="near"),
    )
    result = train(config)
    assert result.history is not None
    assert list(result.history["epoch"]) == [1, 2, 3]
    assert result.history["train/loss"].between(0, 10).all()
    assert len(read_training_ids(config.output)) == 32
    assert FusionWeights.load(config.output).pairs == 3  # a tenth, held out


@pytest.mark.ray
def test_train_refuses_validation_pairs_among_its_training_pairs(tmp_path, ray_session):
    config = TrainMatcher(
        pairs=synthesized_rows(str(tmp_path / "pairs"), ["a", "b"]),
        val=synthesized_rows(str(tmp_path / "val"), ["b", "c"]),
        tower=base_models.TOWER,
    )
    with pytest.raises(ValueError, match="expected validation pairs apart from training, got 1"):
        train(config)
