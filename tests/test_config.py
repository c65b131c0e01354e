from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmatch import config


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to fit."""

    lr: float = 1e-4
    """Learning rate."""
    ks: tuple[int, ...] = (1, 5)
    """Ranks."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Of the learning rate."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to read."""

    root: str = "data"
    """Directory."""
    max_rejected: float = 0.05
    """Share."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """All kinds of fields that the project's configs have."""

    name: str = "run"
    """Any text."""
    fit: Fit = Fit(lr=0.5)
    """Nested, with a default of its own."""
    data: Data = Data()
    """Nested."""
    val: Data | None = None
    """Nested, maybe absent."""
    test: Data | None = Data(root="test")
    """Nested, there unless taken away."""
    limit: int | None = None
    """A number or nothing."""
    cache: bool = False
    """A choice."""
    size: tuple[int, int] = (64, 256)
    """Two numbers."""
    words: tuple[str, ...] = ()
    """Any number of words."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"Train: expected limit >= 0, got {self.limit}.")


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "site é.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    "value",
    [
        Train(),
        Train(limit=0, cache=True, size=(1, 2), words=("a", "b c", "", "é")),
        Train(val=Data(root="s3://bucket/x", max_rejected=0.0), test=None),
        Train(val=Data(), test=Data()),
        Train(fit=Fit(lr=1e-05, ks=(), schedule="constant")),
        Train(fit=Fit(lr=float("inf"), ks=(7,))),
        Train(fit=Fit(lr=-2.5e-07, ks=(-1, -2))),
        Train(name="--fit.lr", data=Data(root="")),
        Train(name="None"),
        Train(name="-1"),
        Train(name="yes: [no, #7] '\"\n"),
    ],
)
def test_dump_then_parse_gives_an_equal_config(file, value):
    assert config.parse(Train, ["--config", file(config.dump(value))]) == value


_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)


@settings(deadline=None, max_examples=25)
@given(
    name=_text,
    root=_text,
    lr=st.floats(allow_nan=False),
    limit=st.none() | st.integers(0, 10**12),
    ks=st.lists(st.integers(-9, 9)).map(tuple),
)
def test_dump_then_parse_any_values_give_an_equal_config(
    tmp_path_factory, name, root, lr, limit, ks
):
    value = Train(name=name, limit=limit, fit=Fit(lr=lr, ks=ks), val=Data(root=root))
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(config.dump(value), encoding="utf-8")
    assert config.parse(Train, ["--config", str(path)]) == value


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
@pytest.mark.parametrize("before", [True, False])
def test_parse_flag_beats_file_beats_default_in_any_order(file, form, before):
    path = file("fit: {lr: 0.25, ks: [3]}\nname: filed\n")
    given_file = [word.format(path) for word in form]
    flags = ["--fit.lr", "0.125", "--fit.ks", "8", "9"]
    read = config.parse(Train, [*flags, *given_file] if before else [*given_file, *flags])
    assert read == Train(name="filed", fit=Fit(lr=0.125, ks=(8, 9)))


def test_parse_later_file_beats_earlier_field_by_field(tmp_path):
    first, second = tmp_path / "base.yaml", tmp_path / "best.yaml"
    first.write_text("fit: {lr: 0.25, ks: [3]}\nval: {root: x}\ntest: null\n")
    second.write_text("fit: {lr: 0.5}\nval: null\ntest: {root: y}\n")
    read = config.parse(Train, ["--config", str(first), f"--config={second}"])
    assert read == Train(fit=Fit(lr=0.5, ks=(3,)), val=None, test=Data(root="y"))


@dataclass(frozen=True, kw_only=True)
class Window:
    """Two fields that are judged together, and whose defaults are fit for no use."""

    start: int = 0
    """First."""
    stop: int = 0
    """Last."""

    def __post_init__(self) -> None:
        if self.start >= self.stop:
            raise ValueError(f"expected start < stop, got {self.start} and {self.stop}.")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A part and an outer config that are judged whole."""

    train: Data = Data()
    """Always there."""
    val: Data | None = None
    """Maybe."""
    window: Window | None = None
    """Maybe."""

    def __post_init__(self) -> None:
        if self.train == self.val:
            raise ValueError("expected other rows than in training")


@pytest.mark.parametrize("filed", [True, False])
def test_parse_judges_fields_against_each_other_when_all_are_set(file, filed):
    words = ["--val.root", "data", "--val.max-rejected", "0.5", "--window.start", "3"]
    path = file("window: {stop: 5}\nval: {root: data}\n")
    given_file = ["--config", path] if filed else ["--window.stop", "5"]
    read = config.parse(Windows, [*words, *given_file])
    assert read == Windows(val=Data(max_rejected=0.5), window=Window(start=3, stop=5))


@pytest.mark.parametrize("words", [["--val.root", "data"], ["--window.start", "3"]])
def test_parse_still_refuses_fields_that_do_not_fit_together(words):
    with pytest.raises((SystemExit, ValueError)):
        config.parse(Windows, words)


def test_override_judges_fields_against_each_other_when_all_are_set():
    before = Window(start=1, stop=2)
    assert config.override(before, {"start": 5, "stop": 7}) == Window(start=5, stop=7)
    outer = Windows(val=Data(root="x"), window=before)
    moved = config.override(outer, {"window.start": 5, "window.stop": 7, "val.root": "y"})
    assert (moved.window, moved.val) == (Window(start=5, stop=7), Data(root="y"))
    with pytest.raises(ValueError, match="expected start < stop, got 9 and 7"):
        config.override(moved, {"window.start": 9})


def test_parse_default_of_a_nested_part_survives_flags_on_its_neighbours():
    assert config.parse(Train, ["--fit.ks", "3"]).fit == Fit(lr=0.5, ks=(3,))


def test_parse_absent_part_is_there_once_a_field_of_it_is_set(file):
    assert config.parse(Train, []).val is None
    assert config.parse(Train, ["--val.root", "x"]).val == Data(root="x")
    assert config.parse(Train, ["--val.max_rejected=0.5"]).val == Data(max_rejected=0.5)
    path = file("val: {max_rejected: 0.5}")
    read = config.parse(Train, ["--val.root", "x", "--config", path])
    assert read.val == Data(root="x", max_rejected=0.5)
    read = config.parse(Train, ["--config", file("val: null"), "--val.root", "x"])
    assert read.val == Data(root="x")


def test_parse_none_takes_a_part_away_and_flags_keep_its_default(file):
    assert config.parse(Train, ["--test", "None"]).test is None
    assert config.parse(Train, ["--test.max-rejected", "1"]).test == Data(
        root="test", max_rejected=1.0
    )
    path = file("val: {root: x}")
    assert config.parse(Train, ["--config", path, "--val", "None"]).val is None


@pytest.mark.parametrize(
    "words",
    [
        ["--fit.learning-rate", "1"],
        ["--lr", "1"],
        ["--fit.lr", "fast"],
        ["--fit.schedule", "linear"],
        ["--cache", "True"],
        ["--size", "1"],
    ],
)
def test_parse_wrong_flag_exits_with_an_error(words):
    with pytest.raises(SystemExit) as caught:
        config.parse(Train, words)
    assert caught.value.code not in (0, None)


@pytest.mark.parametrize("word", ["--config", "--config="])
def test_parse_config_without_a_file_is_refused(word):
    with pytest.raises(ValueError, match="--config expects the path"):
        config.parse(Train, [word])


def test_parse_values_that_the_config_refuses_raise_its_error():
    with pytest.raises(ValueError, match="expected limit >= 0, got -3"):
        config.parse(Train, ["--limit", "-3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fit: {learning_rate: 1}", "fit.learning_rate: expected one of the fields lr, ks"),
        ("[1, 2]", "expected a YAML mapping"),
        ("limit: many", "limit: expected a value of type int, got 'many'"),
        ("limit: true", "limit: expected a value of type int, got True"),
        ("cache: 1", "cache: expected a value of type bool, got 1"),
        ("name: 007", "name: expected a text (in quotes), got 7"),
        ("fit: {lr: fast}", "fit.lr: expected a value of type float, got 'fast'"),
        ("fit: {schedule: linear}", "fit.schedule: expected one of 'constant', 'cosine'"),
        ("fit: 3", "fit: expected"),
        ("size: [1]", "size: expected a list of 2, got [1]"),
        ("fit: {ks: [1, x]}", "fit.ks: expected a value of type int, got 'x'"),
        ("test: {roots: x}", "test.roots: expected one of the fields root"),
        ("fit: {lr", "while parsing"),
    ],
)
def test_parse_wrong_file_is_refused_with_file_field_and_value(file, text, message):
    path = file(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (below)
        config.parse(Train, ["--config", path])
    assert path in str(caught.value)
    assert message in str(caught.value)


def test_parse_file_that_is_not_there_is_refused_with_its_name():
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        config.parse(Train, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fit: {lr: 1e-4}", Train(fit=Fit(lr=1e-4))),  # text for YAML 1.1
        ("fit: {lr: 1}", Train(fit=Fit(lr=1.0))),
        ("cache: true\nlimit: null", Train(cache=True)),
        ("words: one", Train(words=("one",))),
        ("data: {max-rejected: 1}", Train(data=Data(max_rejected=1.0))),
        ("val: {}", Train(val=Data())),
    ],
)
def test_parse_values_of_a_file_take_the_types_of_their_fields(file, text, expected):
    read = config.parse(Train, ["--config", file(text)])
    assert read == expected
    assert type(read.fit.lr) is float


def test_parse_choices_are_flags_without_a_value(file):
    path = file("cache: true")
    assert config.parse(Train, ["--cache"]).cache
    assert not config.parse(Train, ["--no-cache", "--config", path]).cache


def test_parse_help_shows_files_optional_parts_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse(Train, ["--help"], prog="cvmatch train")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "usage: cvmatch train" in shown
    for text in (
        "--config FILE",
        "--val.root",
        "--test.root",
        "--cache, --no-cache",
        "(default: 0.5)",
    ):
        assert text in shown
    assert "Absent unless one of their flags is set: --val, --test." in shown


def test_parse_does_not_change_the_words_it_is_given():
    words = ["--test", "None", "--cache"]
    config.parse(Train, words)
    assert words == ["--test", "None", "--cache"]


def test_override_dotted_paths_replace_and_leave_the_original():
    before = Train()
    after = config.override(before, {"fit.lr": 1.0, "limit": 3, "val": Data()})
    assert after == Train(fit=Fit(lr=1.0), limit=3, val=Data())
    assert before == Train()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fit.learning", r"Fit has no field 'learning' \(in 'fit\.learning'\); it has \['lr'"),
        ("lr", r"Train has no field 'lr'"),
        ("fit.lr.x", r"'fit\.lr\.x': 0\.5 has no fields"),
        ("val.root", r"'val\.root': None has no fields"),
    ],
)
def test_override_unknown_path_says_what_there_is(path, message):
    with pytest.raises(ValueError, match=message):
        config.override(Train(), {path: 1})


def test_override_checks_the_values_as_the_constructor_does():
    with pytest.raises(ValueError, match="expected limit >= 0, got -1"):
        config.override(Train(), {"limit": -1})


def test_flat_names_are_those_that_override_takes():
    flat = config.flat(Train(val=Data(root="x")))
    assert flat["fit.lr"] == 0.5
    assert flat["val.root"] == "x"
    assert flat["size"] == [64, 256]
    assert config.override(Train(), {"fit.lr": flat["fit.lr"]}) == Train()
