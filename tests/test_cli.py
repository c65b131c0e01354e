"""How the command `cvmatch` begins and ends; what each command does has tests of its own."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from cvmatch import cli
from cvmatch.runtime import session

ROOT = Path(__file__).parents[1]
NAMES = [command.name for command in cli.COMMANDS]
HEAVY = {"torch", "ray", "numpy", "pandas", "pyarrow", "PIL", "faiss", "transformers"}

IMPORTED = """
import contextlib, io, sys
from cvmatch.cli import main
printed = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
    main(argv=sys.argv[1:])
assert printed.getvalue()
print(*sys.modules)
"""


def modules(*words: str) -> set[str]:
    """What is imported when `cvmatch WORDS` has ended."""
    typed = subprocess.run(
        [sys.executable, "-c", IMPORTED, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(typed.stdout.split())


def failed(words: list[str], capsys) -> tuple[int, str]:
    """Exit code and last line on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv=words)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err.strip()


def test_help_lists_the_commands_in_the_order_of_the_pipeline(capsys):
    for words in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv=words)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert [shown.index(f"  {name} ") for name in NAMES] == sorted(
            shown.index(f"  {name} ") for name in NAMES
        )
        assert all(len(line) <= 100 for line in shown.splitlines())


def test_help_of_index_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main("index", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "index vacuum" in shown
    assert "synthesize" not in shown


def test_help_imports_nothing_heavy():
    assert not modules("--help") & (HEAVY | {"tyro", "yaml"})


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_shows_its_flags_and_imports_nothing_heavy(name, capsys):
    assert not modules(*name.split(), "--help") & HEAVY
    with pytest.raises(SystemExit) as caught:
        cli.main(argv=[*name.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: cvmatch {name}" in shown
    assert "--config FILE" in shown


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("train-")])
def test_help_of_a_training_shows_its_validation_rows(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(argv=[name, "--help"])
    assert re.search(r"--val(\.root)? STR", capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_command_with_an_unknown_flag_stops_with_an_error(name, capsys):
    code, message = failed([*name.split(), "--no-such-flag", "1"], capsys)
    assert code == cli.WRONG_INPUT
    assert "no-such-flag" in message


def test_wrong_settings_file_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("fit: {epochs: many}")
    code, message = failed(["train-matcher", "--config", f"{tmp_path}/wrong.yaml"], capsys)
    assert code == cli.WRONG_INPUT
    assert message.startswith("cvmatch train-matcher: ")
    assert "fit.epochs: expected a value of type int, got 'many'" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train"], "expected one of train-segmenter, "),
        (["index", "destroy"], "one of info, verify"),
    ],
)
def test_unknown_command_says_what_there_is(words, expected, capsys):
    code, message = failed(words, capsys)
    assert code == cli.WRONG_INPUT
    assert expected in message
    assert repr(words[-1]) in message


def test_wrong_input_ends_in_one_line(capsys, tmp_path):
    code, message = failed(["index", "info", "--index", str(tmp_path / "none")], capsys)
    assert code == cli.WRONG_INPUT
    assert message.startswith("cvmatch index info: ")
    assert str(tmp_path) in message
    assert len(message.splitlines()) == 1


def test_wrong_settings_name_the_flag_and_the_value(capsys):
    code, message = failed(["train-matcher", "--fit.batch", "0"], capsys)
    assert code == cli.WRONG_INPUT
    assert "expected a batch" in message
    assert "Try --fit.batch 1" in message


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), ValueError("a library's")])
def test_defect_keeps_its_traceback_and_ends_in_a_line(error, monkeypatch, capsys):
    def run(config):
        raise error

    command = cli.COMMANDS[0]
    monkeypatch.setattr(cli, "COMMANDS", (dataclasses.replace(command, run=run),))
    code, message = failed(command.name.split(), capsys)
    assert code == cli.FAILED
    assert "Traceback" in message
    *_, last = message.splitlines()
    assert last.startswith(f"cvmatch {command.name}: failed: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["synthesize", "--output", "rows"], "--output"),
        (["train-matcher", "--output", "/shared/models/matcher"], "--fit.storage"),
    ],
)
def test_relative_output_of_a_job_in_rays_copy_is_refused(
    words, flag, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    code, message = failed(words, capsys)
    assert code == cli.WRONG_INPUT
    assert f"{flag}: expected an absolute path or a URI" in message


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["train-matcher"], "below runs"),
        (["train-matcher", "--fit.name", "one"], "from the last checkpoint of runs/one"),
        (["synthesize", "--output", "rows"], "Finished rows are in rows; the same command goes on"),
        (["tune", "--name", "two"], "runs/two"),
    ],
)
def test_interrupt_says_what_is_kept_and_how_to_go_on(words, kept, monkeypatch, capsys):
    def run(config):
        raise KeyboardInterrupt

    commands = tuple(dataclasses.replace(one, run=run) for one in cli.COMMANDS)
    monkeypatch.setattr(cli, "COMMANDS", commands)
    code, message = failed(words, capsys)
    assert code == cli.INTERRUPTED
    assert message.startswith(f"cvmatch {words[0]}: interrupted. ")
    assert kept in message
    assert len(message.splitlines()) == 1


def test_interrupt_of_a_process_ends_in_one_line(tmp_path):
    typed = subprocess.Popen(
        [sys.executable, "-m", "cvmatch.cli", "demo-data", "--preset", "demo", "--output", "w"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, they and their children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    time.sleep(2.0)  # wherever it is by then
    errors = _interrupt(typed)
    assert typed.returncode == cli.INTERRUPTED, errors
    assert errors.strip().splitlines()[-1].startswith("cvmatch demo-data: interrupted. ")
    assert errors.count("Traceback") == errors.count("Exception ignored")


def _interrupt(typed: subprocess.Popen[str]) -> str:
    """Press Ctrl-C until it ends: Python loses one that comes within a callback of fork."""
    for _ in range(5):
        typed.send_signal(signal.SIGINT)
        try:
            return typed.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            continue
    typed.kill()
    pytest.fail(f"it ran on after Ctrl-C: {typed.communicate()[1]}")


def test_console_script_and_jobs_are_the_same_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"cvmatch": "cvmatch.cli:main"}
    jobs = {path.stem.replace("_", "-"): path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    assert set(jobs) == {name.split()[0] for name in NAMES} - {"demo-data"}
    for name, text in jobs.items():
        assert text.endswith(f'from cvmatch.cli import main\n\nmain("{name}")\n')


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("train-")])
def test_training_that_the_machine_cannot_hold_is_refused_before_anything_is_read(
    name, monkeypatch, capsys
):
    monkeypatch.setattr(session, "start", lambda **_: pytest.fail("Ray was started"))
    many = "--fit.workers 64 --fit.batch 64 --fit.cpus-per-worker 0.01 --fit.gpus-per-worker 1"
    code, message = failed([name, *many.split()], capsys)
    assert code == cli.WRONG_INPUT
    assert "64 training workers" in message
    assert "--fit.gpus-per-worker" in message
    code, message = failed([name, "--fit.gpus-per-worker", "1"], capsys)
    assert code == cli.WRONG_INPUT
    assert "expected workers with 1 GPUs each, got 0 workers" in message


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("train-segmenter", ["--base /nowhere/b3"]),
        ("train-matcher", ["--tower /nowhere/vgg"]),
        (
            "train-generator",
            ["--diffusion /nowhere/sd", "--clip /nowhere/clip", "--lpips-vgg /nowhere/vgg"],
        ),
    ],
)
def test_training_without_its_base_models_is_refused_before_anything_is_read(
    command, parts, monkeypatch, capsys
):
    monkeypatch.setattr(session, "start", lambda **_: pytest.fail("Ray was started"))
    code, message = failed([command, *" ".join(parts).split()], capsys)
    assert code == cli.WRONG_INPUT
    assert all(part in message for part in parts), message


def test_to_json_has_null_for_what_json_has_no_word_for():
    answer = {"latitude": float("inf"), "scores": [1.5, float("nan")], "deep": {"x": -float("inf")}}
    assert json.loads(cli.to_json(answer)) == {
        "latitude": None, "scores": [1.5, None], "deep": {"x": None},
    }  # fmt: skip
    assert "Infinity" not in cli.to_json(answer)
