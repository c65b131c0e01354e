"""Write docs/options.md from the settings of all commands: `python -m tools.options`."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cvmatch import cli

OUTPUT = Path(__file__).parents[1] / "docs" / "options.md"

HEAD = """# Options

Made by `python -m tools.options` from the settings; `cvmatch COMMAND --help` shows the same.

- Every command also takes `--config FILE` (YAML). It may be repeated: the later file wins, and a
  flag wins over all files.
- A flag whose default is yes or no takes no value: `--fit.cache`, `--fit.no-cache`.
- An absent part, such as `--val`, is there as soon as one of its flags is set.
"""


def main() -> None:
    """Write the page."""
    OUTPUT.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the whole page as Markdown: a section and a table for each command."""
    return "\n".join([HEAD, *map(_section, cli.COMMANDS)])


def _section(command: cli.Command) -> str:
    settings: Any = cli.settings_of(command)
    lines = [f"| `{flag}` | {default} | {text} |" for flag, default, text in _rows(settings, "")]
    head = f"## cvmatch {command.name}\n\n{command.help[0].upper()}{command.help[1:]}.\n"
    return "\n".join([head, "| flag | default | meaning |", "|---|---|---|", *lines, ""])


def _rows(settings: type, prefix: str, default: Any = None) -> Iterator[tuple[str, str, str]]:
    """Flag, default and meaning of each field, those of nested parts after it."""
    texts, kinds = _field_texts(settings), typing.get_type_hints(settings)
    nested = []
    for field in dataclasses.fields(typing.cast(Any, settings)):
        flag = f"{prefix}{field.name.replace('_', '-')}"
        value = _default(field) if default is None else getattr(default, field.name)
        parts = [k for k in (kinds[field.name], *typing.get_args(kinds[field.name])) if _is_part(k)]
        if parts:
            absent = "absent" if value is None else ""
            nested.append((f"--{flag}", absent, texts[field.name]))
            nested += _rows(parts[0], f"{flag}.", value)
        else:
            yield f"--{flag}", _shown(value), texts[field.name]
    yield from nested


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is dataclasses.MISSING:
        return "required"
    if value in ("", None, ()):
        return "none" if value is None else ""
    return f"`{' '.join(map(str, value))}`" if isinstance(value, tuple) else f"`{value}`"


def _field_texts(settings: type) -> dict[str, str]:
    """The text below each field in the source, inherited ones too, in one line."""
    texts = {}
    for parent in reversed(settings.__mro__[:-1]):
        (source,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        for field, text in itertools.pairwise(typing.cast(ast.ClassDef, source).body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = " ".join(ast.literal_eval(text.value).split())
                texts[ast.unparse(field.target)] = words.replace("|", "\\|")
    return texts


if __name__ == "__main__":
    main()
