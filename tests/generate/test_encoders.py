"""Base models: found, named where they are missing, and their sizes."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip import CLIPConfig, CLIPTextConfig

from cvmatch.demo import models
from cvmatch.generate.batches import ImageSizes
from cvmatch.generate.encoders import (
    FrozenEncoders,
    check_base_models,
    read_sizes,
    split_revision,
)
from cvmatch.generate.model import Generator
from tests.helpers.generator import (
    CONDITIONING,
    PANORAMA,
    clip_sizes,
    make_generator,
    write_base,
)


def test_clip_of_a_whole_checkpoint_gives_the_vision_tower(tmp_path):
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
    )
    both = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=CLIPVisionConfig(**clip_sizes()).to_dict(),
        projection_dim=32,
    )
    whole = CLIPModel(both).eval()
    whole.save_pretrained(tmp_path)
    vision = CLIPVisionModel.from_pretrained(tmp_path, use_safetensors=True).eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = whole.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(vision(pixels).last_hidden_state, expected)
    assert CLIPVisionConfig.from_pretrained(tmp_path).image_size == 64


def test_scheduler_that_predicts_the_sample_is_refused(tmp_path):
    write_base(str(tmp_path), "sample")
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction', got 'sample'"):
        make_generator(str(tmp_path))


@pytest.mark.parametrize("flag", ["--diffusion", "--clip"])
def test_generator_base_out_of_reach_names_the_flag(
    toy: str, flag: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"--diffusion": os.path.join(toy, "diffusion"), "--clip": os.path.join(toy, "clip")}
    names[flag] = "nobody/no-such-model"
    with pytest.raises(ValueError, match=f"{flag} nobody/no-such-model"):
        Generator.base(names["--diffusion"], names["--clip"], CONDITIONING)


def test_sizes_come_from_the_config_files(toy: str):
    found = read_sizes(os.path.join(toy, "diffusion"), os.path.join(toy, "clip"), 256)
    assert found == ImageSizes(panorama=PANORAMA, tile=64, latent=16)


def test_revision_of_the_base_model_follows_its_id(tmp_path):
    assert split_revision("CompVis/stable-diffusion-v1-4") == (
        "CompVis/stable-diffusion-v1-4",
        "main",
    )
    assert split_revision("CompVis/stable-diffusion-v1-4@fp16")[1] == "fp16"
    local = tmp_path / "mine@home"
    local.mkdir()
    assert split_revision(str(local)) == (str(local), "main")


def rename(name: str) -> str:
    """The names of Stable Diffusion 1's VAE."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value"}
    parts: list[str] = [
        old.get(part, part) for part in name.replace("to_out.0", "proj_attn").split(".")
    ]
    return ".".join(parts)


@pytest.fixture
def bases(tmp_path):
    """Copies of tiny base models, and a function that changes the weights of a part."""
    shutil.copytree(models.DIFFUSION, tmp_path / "sd")
    shutil.copytree(models.CLIP, tmp_path / "clip")

    def change(file, function):
        state = load_file(tmp_path / file)
        save_file(function(state), tmp_path / file, {"format": "pt"})

    return str(tmp_path / "sd"), str(tmp_path / "clip"), change


@pytest.mark.parametrize(
    ("file", "flag"),
    [
        ("sd/unet/diffusion_pytorch_model.safetensors", "--diffusion .*unet"),
        ("sd/vae/diffusion_pytorch_model.safetensors", "--diffusion .*vae"),
        ("clip/model.safetensors", "--clip .*clip"),
    ],
)
def test_base_weights_that_do_not_fit_are_refused_before_and_when_they_are_loaded(
    bases, file, flag
):
    diffusion, clip, change = bases
    check_base_models(diffusion, clip)
    change(file, lambda state: {f"module.{name}": value for name, value in state.items()})
    with pytest.raises(ValueError, match=rf"{flag}: expected all weights.*begin with 'module\.'"):
        check_base_models(diffusion, clip)
    change(file, lambda state: {name.removeprefix("module."): state[name] for name in [*state][2:]})
    with pytest.raises(ValueError, match=rf"{flag}: expected all weights.*got 2 that lack"):
        check_base_models(diffusion, clip)
    with pytest.raises(ValueError, match=rf"{flag}: expected all weights.*got 2 that lack"):
        Generator.base(diffusion, clip, CONDITIONING)


def test_base_vae_of_the_names_of_stable_diffusion_1_is_taken(bases):
    diffusion, clip, change = bases
    before = FrozenEncoders.load(diffusion, clip, 256).vae.state_dict()
    file = "sd/vae/diffusion_pytorch_model.safetensors"
    change(file, lambda state: {rename(name): value for name, value in state.items()})
    check_base_models(diffusion, clip)
    torch.testing.assert_close(FrozenEncoders.load(diffusion, clip, 256).vae.state_dict(), before)
