"""Configuration: frozen dataclasses <-> command line <-> YAML."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import tyro
import yaml

from cvmatch import storage

C = TypeVar("C")


def parse(config: type[C], argv: list[str] | None = None) -> C:
    """Read `config` from flags, which win over `--config FILE`, which wins over the defaults.

    A YAML file is a list of flags with indentation (`fit: {lr: 1e-4}` is `--fit.lr 1e-4`), so both
    go through one parser and give the same messages. `argv` defaults to the process's arguments.
    A part that may be absent (`val: Ingest | None = None`) is there as soon as one of its fields is
    set (`--val.root data`); `--val None` takes it away.
    """
    filed, words = _filed(list(sys.argv[1:] if argv is None else argv))
    default: C | None = None
    for flag, path, part in _optional(config):
        gone = _drop_none(filed, flag)
        if _drop_none(words, flag):
            gone, filed = True, [word for word in filed if not _below(flag, word)]
        if any(_below(flag, word) for word in filed + words):
            default = default or config()
            there = functools.reduce(getattr, path.split("."), default)
            default = override(default, {path: there or part()})
        elif gone:
            default = override(default or config(), {path: None})
    start: dict[str, Any] = {} if default is None else {"default": default}
    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(config, args=[*filed, *words], config=options, **start)


def override(config: C, changes: Mapping[str, Any]) -> C:
    """`config` with the fields at dotted paths replaced: `{"fit.lr": 1e-4}`.

    Raises:
        ValueError: a path names no field; says which fields there are.
    """
    for path, value in changes.items():
        config = _replace(config, path, path.split("."), value)
    return config


def dump(config: Any) -> str:
    """YAML text that `parse` reads back to an equal config."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Any) -> dict[str, Any]:
    """`config` as nested dictionaries of plain values, tuples as lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def flat(config: Any) -> dict[str, Any]:
    """`config` as one dictionary of dotted field names, as MLflow's parameters want it."""
    return dict(_walk(plain(config), ""))


def _replace(config: Any, whole: str, parts: list[str], value: Any) -> Any:
    name, *rest = parts
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"{whole!r}: {config!r} has no fields, so it cannot have {name!r}.")
    fields = [f.name for f in dataclasses.fields(config)]
    if name not in fields:
        raise ValueError(
            f"{type(config).__name__} has no field {name!r} (in {whole!r}); it has {fields}."
        )
    if rest:
        value = _replace(getattr(config, name), whole, rest, value)
    return dataclasses.replace(config, **{name: value})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _walk(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        found += _walk(value, f"{dotted}.") if isinstance(value, dict) else [(dotted, value)]
    return found


def _flags(tree: dict[str, Any]) -> list[str]:
    words = []
    for name, value in _walk(tree, ""):
        flag = f"--{name.replace('_', '-')}"
        # One word for one value, so that text with a leading dash is not taken for a flag.
        words += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return words


def _filed(words: list[str]) -> tuple[list[str], list[str]]:
    """The flags in the file that `--config` names, and the words without it."""
    for at, word in enumerate(words):
        flag, given, location = word.partition("=")
        if flag != "--config":
            continue
        rest = words[at + 1 :] if given else words[at + 2 :]
        location = location if given else "".join(words[at + 1 : at + 2])
        if not location:
            raise SystemExit("--config expects the path of a YAML file, got nothing after it.")
        tree = yaml.safe_load(storage.read_text(location)) or {}
        if not isinstance(tree, dict):
            raise SystemExit(f"{location}: expected a YAML mapping of fields, got {tree!r:.80}.")
        return _flags(tree), words[:at] + rest
    return [], words


def _optional(config: Any, prefix: str = "") -> list[tuple[str, str, Any]]:
    """Flag, dotted path and type of each part of `config` that may be None, outer parts first."""
    found = []
    for field in dataclasses.fields(config):
        kinds = [kind for kind in (field.type, *get_args(field.type)) if _is_part(kind)]
        path = f"{prefix}{field.name}"
        for kind in kinds:
            if field.type is not kind:
                found.append((f"--{path.replace('_', '-')}", path, kind))
            found += _optional(kind, f"{path}.")
    return found


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _below(flag: str, word: str) -> bool:
    """Whether a word sets a field of the part `flag`; tyro takes _ and - alike."""
    return word.replace("_", "-").startswith(f"{flag}.")


def _drop_none(words: list[str], flag: str) -> bool:
    """Take `flag None` out of the words; whether it was there."""
    for at, word in enumerate(words):
        if word == f"{flag}=None" or words[at : at + 2] == [flag, "None"]:
            del words[at : at + (1 if word == f"{flag}=None" else 2)]
            return True
    return False
