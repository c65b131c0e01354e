"""Every command that README.md and docs/ tell a person to type, typed as it stands there."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from cvmatch import cli, config
from cvmatch.data import tables
from cvmatch.tune import search_space
from tests.helpers.documents import (
    DOCUMENTS,
    README,
    ROOT,
    SHORTER,
    TOY,
    UNTYPED,
    blocks,
    commands,
    scripts,
    untyped,
)

KINDS = {"sh", "text", "yaml", "python", "json"}
"""What a fence may hold; `sh` and `python` are run."""

CONFIGS = {
    "segmenter.yaml": "train-segmenter",
    "generator.yaml": "train-generator",
    "synthesize.yaml": "synthesize",
    "matcher.yaml": "train-matcher",
    "index.yaml": "build-index",
    "search.yaml": "search-rows",
    "tune.yaml": "tune",
}
"""Of which command the settings in configs/cvusa and configs/cluster are."""

SETTINGS = {command.name: cli.settings_of(command) for command in cli.COMMANDS}


@pytest.mark.ray
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_runs_as_it_stands_there(document, readme):
    if document != README:  # that is the fixture
        readme.run_document(document)


@pytest.mark.ray
def test_what_the_commands_made_is_there(readme):
    at = readme.folder
    answers = pa.concat_tables(tables.batches(str(at / "data" / "found"), ["tiles"]))
    assert [len(tiles) for tiles in answers["tiles"].to_pylist()] == [10] * 12
    assert "<img" in (at / "found.html").read_text("utf-8")
    best = yaml.safe_load((at / "tuned" / "best.yaml").read_text())
    assert best["tower"] == TOY["matcher.yaml"]["tower"]
    assert (at / "models" / "tuned" / "model.safetensors").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_fence_their_blocks_and_say_what_they_hold(document):
    assert {kind for kind, _ in blocks(document)} <= KINDS
    unfenced = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.M | re.S)
    loose = re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/|python |make |ray |pip ).*", unfenced, re.M)
    assert not loose


def submitted() -> list[str]:
    every = [command for one in DOCUMENTS for text in scripts(one) for command in commands(text)]
    return [command for command in every if command.startswith("ray job submit")]


def test_jobs_that_are_submitted_to_a_cluster_have_flags_that_the_jobs_take():
    assert submitted()
    for command in submitted():
        words = shlex.split(command.replace("$CONFIGS", "configs/cluster"), comments=True)
        python, job, *flags = words[words.index("--") + 1 :]
        assert python == "python"
        name = Path(job).stem.replace("_", "-")
        if name not in SETTINGS:  # a command of several
            name, *flags = f"{name} {flags[0]}", *flags[1:]
        config.parse(SETTINGS[name], flags)


def test_commands_of_make_and_ray_that_are_not_typed_are_known_to_them():
    every = [command for one in DOCUMENTS for text in scripts(one) for command in commands(text)]
    assert set(UNTYPED) == {start for command in every for start in untyped(command)}
    assert all(any(command.startswith(start) for command in every) for start in SHORTER)
    for command in every:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] == "ray":
            command_of_ray: Any = ray_cli
            for name in words[1:3] if words[1] == "job" else words[1:2]:
                command_of_ray = command_of_ray.commands[name]
            known = {flag for parameter in command_of_ray.params for flag in parameter.opts}
            own = words[: words.index("--")] if "--" in words else words
            assert {word for word in own if word.startswith("--")} <= known


def test_search_space_that_the_documents_show_is_one_of_the_matchers_training(tmp_path):
    (text,) = [text for kind, text in blocks(ROOT / "docs" / "tuning.md") if kind == "yaml"]
    (tmp_path / "space.yaml").write_text(text)
    space = search_space.load_space("matcher", str(tmp_path / "space.yaml"))
    search_space.check_space(search_space.load_settings("matcher", ""), space)


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("configs/c*/*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_settings_that_the_documents_name_are_those_of_their_job(path):
    settings = SETTINGS[CONFIGS[path.name]]
    read = config.parse(settings, ["--config", str(path)])
    assert read != settings(), "they change nothing"
