"""Training on Ray: rows -> a published generator that samples every pair."""

import os

import numpy as np
import pytest
import torch

from cvmatch.data import images, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest, Validation
from cvmatch.generate import infer
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Generate, Sampling, TrainGenerator
from cvmatch.generate.train import (
    build_task,
    measure,
    read_training_pairs,
    train,
    with_absolute_paths,
)
from cvmatch.nn import backbones, rng
from cvmatch.runtime.settings import Pool
from cvmatch.training.held_out import choose_held_out
from cvmatch.training.settings import TrainConfig
from tests.helpers.generator import CONDITIONING, PANORAMA
from tests.helpers.present import present


def test_bev_that_does_not_learn_colours_guides_no_sampling():
    with pytest.raises(ValueError, match=r"bev_weight above 0.*--conditioning.low-freq-cells 0"):
        TrainGenerator(bev_weight=0.0)
    TrainGenerator(bev_weight=0.0, conditioning=Conditioning(low_freq_cells=0))


def test_build_in_another_directory_finds_what_the_config_names(
    toy: str, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    tower = backbones.Tower(
        backbones.TowerSpec(arch="vgg", layers=(8, "M", 16, "M"), grid=(1, 1), dim=8)
    )
    backbones.save_tower(tower, str(tmp_path / "tower"))
    monkeypatch.chdir(tmp_path)
    config = TrainGenerator(
        diffusion=os.path.relpath(os.path.join(toy, "diffusion")),
        clip=os.path.relpath(os.path.join(toy, "clip")),
        lpips_vgg="tower",
        conditioning=CONDITIONING,
    )
    config = with_absolute_paths(config)
    (tmp_path / "of a worker").mkdir()
    monkeypatch.chdir("of a worker")
    first = present(build_task(config).lpips).stages.get_parameter("0.0.weight")
    assert torch.equal(first, tower.net.get_parameter("features.0.weight"))


@pytest.mark.ray
def test_train_publishes_a_generator_that_draws_every_pair(toy: str, world_root: str, tmp_path):
    tower = backbones.Tower(
        backbones.TowerSpec(arch="vgg", layers=(8, "M", 16, "M"), grid=(1, 1), dim=8)
    )
    backbones.save_tower(tower, str(tmp_path / "tower"))
    held_out = Ingest(root=world_root, split="val")
    config = TrainGenerator(
        data=Ingest(root=world_root, limit=12),
        val=Validation(root=world_root),
        diffusion=os.path.join(toy, "diffusion"),
        clip=os.path.join(toy, "clip"),
        lpips_vgg=str(tmp_path / "tower"),
        conditioning=CONDITIONING,
        pretrain_bev=1,
        mirror=True,
        latent_cache=str(tmp_path / "latents"),
        output=str(tmp_path / "generator"),
        fit=TrainConfig(
            epochs=1,
            batch=6,
            storage=str(tmp_path / "runs"),
            best="val/psnr",  # which the BEV network alone does not have
        ),
    )
    result = train(config)
    rows = read_training_pairs(config, PairDataset.open(config.data)).take_all()
    ids = [row[schema.PAIR_ID] for row in PairDataset.open(config.data).rows().take_all()]
    learned, held = {row["key"] for row in rows}, {rng.row_key(i) for i in choose_held_out(ids)}
    assert len(held) == 1  # a tenth
    assert learned == {rng.row_key(pair_id) for pair_id in ids} - held
    found = result.metrics or {}
    names = ["train/noise", "train/clip", "train/lpips", "val/loss_correct", "val/loss_shuffled"]
    assert all(np.isfinite(found[name]) and found[name] > 0 for name in [*names, "val/lpips"])
    assert 0 <= found["val/recall_at_10_percent"] <= 1
    assert 0 < found["val/retrieval_mrr"] <= 1
    assert os.path.exists(os.path.join(result.checkpoint, "samples.png"))
    validated = {name: v for name, v in found.items() if name.startswith("val/")}
    assert measure(config, result.checkpoint) == pytest.approx(validated, abs=1e-5)
    rows = PairDataset.open(held_out).rows()
    drawn = infer.generate(
        rows, Generate(model=config.output, num_inference_steps=2, pool=Pool(batch=8))
    ).take_all()
    given = {row[schema.PAIR_ID]: row[schema.GROUND] for row in rows.take_all()}
    assert len(drawn) == len(given) == 12
    assert all(row[schema.ERROR] is None for row in drawn)
    assert len({row[schema.SYNTHETIC] for row in drawn}) == 12
    # Each picture is that of its own pair, whatever the batches were.
    row = drawn[7]
    model = Generator.load(config.output)
    ground = images.decode(given[row[schema.PAIR_ID]], PANORAMA)
    alone = model.sample(
        torch.from_numpy(ground.copy()).permute(2, 0, 1)[None].float() / 255,
        torch.tensor([rng.row_key(row[schema.PAIR_ID])]),
        Sampling(num_inference_steps=2),
    )
    difference = images.decode(row[schema.SYNTHETIC]) - alone[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(difference).max() < 1.5
