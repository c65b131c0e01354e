from pathlib import Path

import pytest

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
