"""What all benchmarks share: flags, the machine, a dated Markdown table, a last line of JSON."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import tyro

from cvmatch.report.page import describe_run
from cvmatch.runtime import progress

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Flags of every benchmark."""

    quick: bool = False
    """The same comparison on fewer rows, in under four minutes on two cores."""
    results: str = os.path.join(_ROOT, "benchmarks", "results")
    """Directory of the tables."""


B = TypeVar("B", bound=Bench)


def flags(kind: type[B]) -> B:
    """The benchmark's settings from the command line; progress goes to the console."""
    progress.to_console()
    return tyro.cli(kind)


def sized(asked: B, usual: Mapping[str, Any]) -> B:
    """What was asked for, with the usual sizes where it was 0."""
    sizes = {name: getattr(asked, name) or size for name, size in usual.items()}
    return dataclasses.replace(asked, **sizes)


def finish(
    bench: Bench,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, float],
    notes: Sequence[str] = (),
) -> None:
    """Write the table to `bench.results`, named by date and script, and print it and the figures.

    `rows` have the same keys, the table's columns; `figures` are the last line, as one JSON object.
    """
    script = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    about = {"Command": _command(script), "Commit": _commit()} | describe_run()
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", *_table(rows), "", *(f"{note}\n" for note in notes)]
    os.makedirs(bench.results, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y-%m-%d-%H%M")
    place = os.path.join(bench.results, f"{stamp}-{script}.md")
    with open(place, "w", encoding="utf-8") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    print("\n".join(_table(rows)))
    print(f"table  {os.path.relpath(place)}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def interval(found: Mapping[str, float], name: str) -> str:
    """A share with its 95 % bounds (`name_low`, `name_high`), in per cent."""
    value, low, high = (100 * found[name + end] for end in ("", "_low", "_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) else str(c) for c in cells)} |"

    names = list(rows[0])
    return [line(names), line(["---"] * len(names)), *(line(list(row.values())) for row in rows)]


def _command(script: str) -> str:
    """As it was typed, but for where this machine keeps things."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{script}.py", *words])


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.check_output(
            ["git", *words], cwd=_ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        changed = " and changes" if git("status", "--porcelain", "cvmatch", "benchmarks") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
