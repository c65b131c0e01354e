import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.documents import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """The instructions, those that go on (`\\`) joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.M)
    return [line for line in text.replace("\\\n", "").splitlines() if line]


def copied(lines: list[str]) -> set[str]:
    """What is copied from the checkout."""
    copies = [
        line.split()[1:] for line in lines if line.startswith("COPY ") and "--from=" not in line
    ]
    return {word for words in copies for word in words[:-1] if not word.startswith("--")}


def test_dockerfile_has_nothing_that_its_linter_names():
    linter = Path(sys.prefix, "bin", "hadolint")
    told = subprocess.run(
        [str(linter), str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout


def test_what_images_copy_is_there_and_alone_is_sent_to_the_builder(lines):
    assert [path for path in copied(lines) if not (ROOT / path).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied(lines)


def test_images_install_the_pinned_versions(lines):
    installs = [
        command
        for line in lines
        for command in line.split("&&")
        if "uv pip install" in command and "--no-deps ." not in command
    ]
    assert len(installs) == 3
    assert all("--constraints constraints.txt" in command for command in installs)


def test_cpu_image_takes_torch_before_what_depends_on_it_and_from_an_index_of_its_own(lines):
    (install,) = [line for line in lines if '--default-index "$TORCH_INDEX"' in line]
    assert install.index("--no-deps torch torchvision") < install.index(
        "--requirements pyproject.toml"
    )
    assert 'ARG TORCH_INDEX=""' in lines  # no host: some sites have a mirror


def test_targets_differ_in_what_they_start_from_and_in_torch_alone(lines):
    stages = "\n".join(lines).split("FROM ")
    cpu, gpu = (
        next(one for one in stages if one.startswith(f"ray-{name} AS {name}\n"))
        for name in ("cpu", "gpu")
    )
    cpu = re.sub(r'ARG TORCH_INDEX=""\n|if \[ -n.*?; fi\s*&& ', "", cpu).replace("cpu", "gpu")
    assert cpu.split() == gpu.split()
