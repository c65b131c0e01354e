"""Configuration: frozen dataclasses <-> command line <-> YAML."""

import copy
import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, TypeVar, cast, get_args

import tyro
import yaml

from cvmatch.data import storage

C = TypeVar("C")


def parse(config: type[C], argv: list[str] | None = None) -> C:
    """Read `config` from flags, which win over `--config FILE`, which wins over the defaults.

    A YAML file is a list of flags with indentation (`fit: {lr: 1e-4}` is `--fit.lr 1e-4`), so both
    go through one parser and give the same messages; of several files the later wins. `argv`
    defaults to the process's arguments. A part that may be absent (`val: Ingest | None = None`) is
    there as soon as one of its fields is set (`--val.root data`); `--val None` takes it away.

    Checks of one field against another (`__post_init__`) run once, when all fields are set.
    """
    filed, words = _filed(list(sys.argv[1:] if argv is None else argv))
    parts: dict[str, Any] = {}
    for flag, path, part in _optional(config):
        gone = _drop_none(filed, flag)
        if _drop_none(words, flag):
            gone, filed = True, [word for word in filed if not _below(flag, word)]
        if any(_below(flag, word) for word in filed + words):
            parts[path] = part
        elif gone:
            parts[path] = None
    default = functools.reduce(
        lambda start, path: _set_part(start, path.split("."), parts[path]), parts, _bare(config)
    )
    start: dict[str, Any] = {"default": default} if parts else {}
    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(config, args=[*filed, *words], config=options, **start)


def override(config: C, changes: Mapping[str, Any]) -> C:
    """Returns `config` with the fields at dotted paths replaced, all at once: `{"fit.lr": 1e-4}`.

    Raises:
        ValueError: a path names no field (says which fields there are), or the values do not fit
            together.
    """
    return _replace(config, [(path, path.split("."), value) for path, value in changes.items()])


def dump(config: Any) -> str:
    """YAML text that `parse` reads back to an equal config."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Any) -> dict[str, Any]:
    """`config` as nested dictionaries of plain values, tuples as lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def flat(config: Any) -> dict[str, Any]:
    """`config` as one dictionary of dotted field names, as MLflow's parameters want it."""
    return dict(_walk(plain(config), ""))


def _replace(config: Any, changes: list[tuple[str, list[str], Any]]) -> Any:
    """Replace fields, each given by its whole path and what is left of it below `config`."""
    values: dict[str, Any] = {}
    below: dict[str, list[tuple[str, list[str], Any]]] = {}
    for whole, (name, *rest), value in changes:
        _require_field(config, whole, name)
        if rest:
            below.setdefault(name, []).append((whole, rest, value))
        else:
            values[name] = value
    for name, nested in below.items():
        values[name] = _replace(values.get(name, getattr(config, name)), nested)
    return dataclasses.replace(config, **values)


def _require_field(config: Any, whole: str, name: str) -> None:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"{whole!r}: {config!r} has no fields, so it cannot have {name!r}.")
    fields = [f.name for f in dataclasses.fields(config)]
    if name not in fields:
        raise ValueError(
            f"{type(config).__name__} has no field {name!r} (in {whole!r}); it has {fields}."
        )


def _bare(config: type[C]) -> C:
    """Returns the defaults of `config` without its checks: what flags will set is still to come."""
    instance = object.__new__(config)
    for field in dataclasses.fields(cast(Any, config)):
        value: Any = tyro.MISSING
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        object.__setattr__(instance, field.name, value)
    return instance


def _set_part(config: C, names: list[str], part: type | None) -> C:
    """Returns a copy, unchecked, that has a part, as its default has it, or None in its place."""
    name, *rest = names
    value = getattr(config, name)
    if rest:
        value = _set_part(value, rest, part)
    elif part is None or not _is_part(type(value)):
        value = part and _bare(part)
    copied = copy.copy(config)
    object.__setattr__(copied, name, value)
    return copied


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
    """The flags in the files that `--config` names, and the words without it."""
    tree: dict[str, Any] = {}
    rest, waiting = [], iter(words)
    for word in waiting:
        flag, given, location = word.partition("=")
        if flag == "--config":
            tree = _merge(tree, _read_tree(location if given else next(waiting, "")))
        else:
            rest.append(word)
    return _flags(tree), rest


def _read_tree(location: str) -> dict[str, Any]:
    if not location:
        raise SystemExit("--config expects the path of a YAML file, got nothing after it.")
    tree = yaml.safe_load(storage.read_text(location)) or {}
    if not isinstance(tree, dict):
        raise SystemExit(f"{location}: expected a YAML mapping of fields, got {tree!r:.80}.")
    return tree


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both trees in one; where they differ, the second."""
    both = {
        name: _merge(first[name], value)
        for name, value in second.items()
        if isinstance(value, dict) and isinstance(first.get(name), dict)
    }
    return {**first, **second, **both}


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
