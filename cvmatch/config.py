"""Configuration: frozen dataclasses <-> command line <-> YAML."""

import copy
import dataclasses
import sys
from collections.abc import Mapping
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
import yaml

C = TypeVar("C")

_FILES = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="FILE",
        help="YAML file of these flags (`fit: {epochs: 5}` is --fit.epochs 5). The later file "
        "wins, and a flag wins over all files.",
    ),
]


def parse(config: type[C], argv: list[str] | None = None, prog: str | None = None) -> C:
    """Read `config` from flags, which win over `--config FILE`, which wins over the defaults.

    Of several files the later wins, field by field. A part that may be absent (`val: Data | None =
    None`) is there as soon as one of its fields is set (`--val.root data`); `--val None`, or `null`
    in a file, takes it away. Checks of one field against another (`__post_init__`) run once, when
    all fields are set.

    Args:
        config: A dataclass of fields and nested dataclasses.
        argv: Words in place of the process's arguments.
        prog: Name of the command in its help.

    Raises:
        SystemExit: help was asked for, or a word is no flag; says which.
        ValueError: a file, or a field of it, is wrong; says which.
    """
    files, words = _split_files(list(sys.argv[1:] if argv is None else argv))
    default = _unchecked(config)
    for file in files:
        default = _update(default, _read_tree(file), file)
    optional = _optional_parts(config)
    for path, part in optional:
        if _drop_none(words, path):
            default = _set_part(default, path.split("."), None)
        if _wants_help(words) or any(_is_below(path, word) for word in words):
            default = _set_part(default, path.split("."), part)
    command = dataclasses.make_dataclass(
        config.__name__,
        [
            ("config", _FILES, dataclasses.field(default=())),
            ("settings", Annotated[config, tyro.conf.arg(name="")], default),
        ],
    )
    description = config.__doc__ or ""
    if optional:
        flags = ", ".join(_flag(path) for path, _ in optional)
        description += f"\n\nAbsent unless one of their flags is set: {flags}."
    options = (tyro.conf.AvoidSubcommands,)
    parsed = tyro.cli(command, prog=prog, description=description, args=words, config=options)
    return parsed.settings


def merge(config: C, location: str) -> C:
    """Returns `config` with the fields that a YAML file sets, as `--config` would.

    Raises:
        ValueError: the file, or a field of it, is wrong, or the values do not fit together.
    """
    return _replace(_update(config, _read_tree(location), location), [])


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


def plain(config: Any) -> dict[str, object]:
    """`config` as nested dictionaries of plain values, tuples as lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def flat(config: Any) -> dict[str, object]:
    """`config` as one dictionary of dotted field names, as MLflow's parameters want it."""
    return dict(_walk(plain(config), ""))


def _replace(config: Any, changes: list[tuple[str, list[str], Any]]) -> Any:
    """Replace fields, each given by its whole path and what is left of it below `config`."""
    values: dict[str, object] = {}
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


def _unchecked(config: type[C]) -> C:
    """Returns the defaults of `config` without its checks, since its fields are still to be set."""
    instance = object.__new__(config)
    for field in dataclasses.fields(cast(Any, config)):
        value: Any = tyro.MISSING
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        object.__setattr__(instance, field.name, value)
    return instance


def _set_field(config: C, name: str, value: Any) -> C:
    """Returns a copy of `config` with a field replaced, without its checks."""
    changed = copy.copy(config)
    object.__setattr__(changed, name, value)
    return changed


def _set_part(config: C, names: list[str], part: type | None) -> C:
    """Returns a copy that has a part, as its default has it, or None in its place."""
    name, *rest = names
    value = getattr(config, name)
    if rest:
        value = _set_part(value, rest, part)
    elif part is None or not dataclasses.is_dataclass(value):
        value = part and _unchecked(part)
    return _set_field(config, name, value)


def _update(config: C, tree: Mapping[str, Any], file: str, prefix: str = "") -> C:
    """Returns a copy with the fields that a file sets, without its checks."""
    kinds = get_type_hints(type(config))
    for key, value in tree.items():
        name = str(key).replace("-", "_")
        path = f"{prefix}{name}"
        if name not in kinds:
            _refuse(file, path, f"one of the fields {', '.join(kinds)}", key)
        part = _part_type(kinds[name])
        if part and isinstance(value, Mapping):
            present = getattr(config, name)
            base = present if dataclasses.is_dataclass(present) else _unchecked(part)
            converted = _update(base, value, file, f"{path}.")
        else:
            converted = _convert(value, kinds[name], file, path)
        config = _set_field(config, name, converted)
    return config


def _convert(value: Any, kind: Any, file: str, path: str) -> Any:
    """Returns a value of a YAML file as the type of its field: a list becomes a tuple, 1e-4 (text
    in YAML 1.1) a number."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and type(None) in kinds:
            return None
        (kind, *_) = [one for one in kinds if one is not type(None)]
        return _convert(value, kind, file, path)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        each = kinds[:1] * len(items) if kinds[-1] is Ellipsis else kinds
        if len(each) != len(items):
            _refuse(file, path, f"a list of {len(each)}", value)
        return tuple(_convert(item, one, file, path) for item, one in zip(items, each, strict=True))
    if origin is Literal:
        if value not in kinds:
            _refuse(file, path, f"one of {', '.join(map(repr, kinds))}", value)
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not kind:
        hint = "a text (in quotes)" if kind is str else f"a value of type {kind.__name__}"
        _refuse(file, path, hint, value)
    return value


def _refuse(file: str, path: str, expected: str, value: Any) -> NoReturn:
    raise ValueError(f"{file}: {path}: expected {expected}, got {value!r:.80}.")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _walk(tree: Mapping[str, object], prefix: str) -> list[tuple[str, object]]:
    found = []
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        found += _walk(value, f"{dotted}.") if isinstance(value, dict) else [(dotted, value)]
    return found


def _split_files(words: list[str]) -> tuple[list[str], list[str]]:
    """Returns the files that `--config` names, and the words without it."""
    files, rest, waiting = [], [], iter(words)
    for word in waiting:
        flag, given, location = word.partition("=")
        if flag == "--config":
            files.append(location if given else next(waiting, ""))
        else:
            rest.append(word)
    return files, rest


def _read_tree(location: str) -> dict[str, object]:
    if not location:
        raise ValueError("--config expects the path of a YAML file, got nothing after it.")
    from cvmatch.data import storage  # noqa: PLC0415 (pyarrow, which help does not need)

    try:
        tree = yaml.safe_load(storage.read_text(location)) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {location}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{location}: expected a YAML mapping of fields, got {tree!r:.80}.")
    return tree


def _optional_parts(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Returns dotted path and type of each part that may be None, outer parts first."""
    parts = []
    for name, kind in get_type_hints(config).items():
        if part := _part_type(kind):
            if part is not kind:
                parts.append((f"{prefix}{name}", part))
            parts += _optional_parts(part, f"{prefix}{name}.")
    return parts


def _part_type(kind: Any) -> type | None:
    """Returns the dataclass that a field of type `kind` holds, if any."""
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            return one
    return None


def _flag(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _is_below(path: str, word: str) -> bool:
    """Whether a word sets a field of the part at `path`; tyro takes _ and - alike."""
    return word.replace("_", "-").startswith(f"{_flag(path)}.")


def _wants_help(words: list[str]) -> bool:
    return bool({"-h", "--help"}.intersection(words))


def _drop_none(words: list[str], path: str) -> bool:
    """Take `--part None` out of the words. Returns whether it was there."""
    flag = _flag(path)
    for index, word in enumerate(words):
        if word == f"{flag}=None" or words[index : index + 2] == [flag, "None"]:
            del words[index : index + (1 if word == f"{flag}=None" else 2)]
            return True
    return False
