"""What all benchmarks share: flags, the machine, a Markdown table, a last line of JSON."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    """Directory of the tables: `NAME.md`, or `NAME-quick.md` of a quick run, which git ignores."""


B = TypeVar("B", bound=Bench)


def parse_flags(kind: type[B]) -> B:
    """Read the settings from the command line; progress goes to the console."""
    progress.to_console()
    return tyro.cli(kind)


def fill_sizes(bench: B, usual: Mapping[str, Any]) -> B:
    """What was bench for, with the usual sizes where it was 0."""
    sizes = {name: getattr(bench, name) or size for name, size in usual.items()}
    return dataclasses.replace(bench, **sizes)


def write_results(
    bench: Bench,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, float],
    notes: Sequence[str] = (),
) -> None:
    """Write the table to `bench.results`, named by the script, and print it and the figures.

    Args:
        bench: the benchmark's settings.
        title: heading of the table.
        rows: with the same keys, the table's columns.
        figures: the last line, as one JSON object.
        notes: paragraphs below the table.
    """
    script = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    about = {"Command": _format_command(script), "Commit": _read_commit()} | describe_run()
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", *_format_table(rows), "", *(f"{note}\n" for note in notes)]
    os.makedirs(bench.results, exist_ok=True)
    path = os.path.join(bench.results, f"{script}{'-quick' if bench.quick else ''}.md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    print("\n".join(_format_table(rows)))
    print(f"table  {os.path.relpath(path)}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def format_interval(numbers: Mapping[str, float], name: str) -> str:
    """Format a share with its 95 % bounds (`name_low`, `name_high`), in per cent; absent: ""."""
    if name not in numbers:
        return ""
    value, low, high = (100 * numbers[name + end] for end in ("", "_low", "_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _format_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) else str(c) for c in cells)} |"

    names = list(rows[0])
    return [line(names), line(["---"] * len(names)), *(line(list(row.values())) for row in rows)]


def _format_command(script: str) -> str:
    """Return the command as it was typed, without this machine's directories."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{script}.py", *words])


def _read_commit() -> str:
    def git(*words: str) -> str:
        return subprocess.check_output(
            ["git", *words], cwd=_ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        changed = " and changes" if git("status", "--porcelain", "cvmatch", "benchmarks") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
