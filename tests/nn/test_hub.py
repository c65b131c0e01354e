import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cvmatch.demo.models import CLIP, DIFFUSION
from cvmatch.nn import hub


def test_check_all_names_every_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="--diffusion") as caught:
        hub.check_all(
            lambda: hub.check_model(str(tmp_path / "sd"), "--diffusion", "unet", "vae"),
            lambda: hub.check_model(CLIP, "--clip"),
            lambda: hub.check_model(str(tmp_path / "segformer"), "--base"),
        )
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--diffusion", "--base"]


def test_check_model_takes_what_can_be_loaded():
    hub.check_model(CLIP, "--clip")
    hub.check_model(DIFFUSION, "--diffusion", "unet", "vae")


def test_check_model_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes((Path(CLIP) / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--clip .*no \*\.safetensors in .*save_pretrained"):
        hub.check_model(str(tmp_path), "--clip")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def lfs(data: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize {len(data)}\n".encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lfs, "a Git LFS pointer: run `git lfs pull`"),
        (lambda _: b"<!DOCTYPE html><html>Not found</html>", "a web page"),
        (lambda _: b"", "an empty file"),
        (half, r"\d+ bytes of \d+: a download that was cut off"),
        (lambda data: data[:100], "100 bytes: a download that was cut off"),
        (lambda _: b"PK\3\4 of torch.save", "a pickle"),
    ],
)
def test_check_model_names_a_file_that_is_damaged(tmp_path, change, message):
    shutil.copytree(CLIP, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"--clip: expected weights in .*{file.name}, got {message}"
    ):
        hub.check_model(str(tmp_path / "clip"), "--clip")


def test_read_state_takes_state_dicts_of_both_formats(tmp_path):
    state = {"weight": torch.ones(2)}
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        torch.testing.assert_close(dict(hub.read_state(str(tmp_path / name), "--weights")), state)
    path = f"{CLIP}/model.safetensors"
    assert hub.read_state(path, "--weights").keys() == load_file(path).keys()


@pytest.mark.parametrize("content", ["module", "half", "html", "tensor"])
def test_read_state_of_anything_else_says_what_to_do_but_never_to_unpickle_it(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(torch.ones(2) if content == "tensor" else nn.Linear(2, 2), path)
    if content == "half":
        path.write_bytes(half(path.read_bytes()))
    elif content == "html":
        path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"--weights.*weights\.pth") as caught:
        hub.read_state(str(path), "--weights")
    assert "weights_only" not in str(caught.value)


def test_strip_prefix_only_where_it_makes_the_names_fit():
    expected = ["features.0.weight", "features.0.bias"]
    wrapped = {f"module.{name}": 1 for name in expected}
    assert [*hub.strip_prefix(wrapped, expected)] == expected
    other = {"module.classifier.weight": 1}
    assert hub.strip_prefix(other, expected) == other
    mixed = wrapped | {"epoch": 3}
    assert hub.strip_prefix(mixed, expected) == mixed
