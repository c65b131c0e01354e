"""Progress of long work that others do: a bar on a terminal, else a log line every ten seconds."""

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_S = 10.0
"""Seconds between log lines."""

BAR_S = 0.5
"""Seconds between updates of the bar."""

ESTIMATE_S = 60.0
"""Seconds from the first results on after which the time of the others is estimated."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


def to_console(level: int = logging.INFO) -> None:
    """Show the log of a job on stderr, and of the libraries only what needs attention."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # it sets its own level, when imported
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # transformers has its own way to be quiet: hub.from_pretrained_kwargs
    for library in ("mlflow", "alembic", "ray", "optuna", "diffusers", "faiss"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")


@contextlib.contextmanager
def watch(
    label: str, total: int, done: Callable[[], int], note: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Show how much of `total` is done while the block runs.

    `done` and `note` (a few words, such as the loss) are called from a thread, so they must only
    read; where they cannot (OSError), what they said last is shown. `total` = 0 means unknown.
    """
    look = _Look(done, note)
    finished = threading.Event()
    console = Console(stderr=True)
    show = _bar if console.is_terminal else _lines
    thread = threading.Thread(
        target=show, args=(label, total, look, finished, console), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def each(label: str, total: int, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, showing how many of `total` the consumer has worked on."""
    done = 0
    with watch(label, total, lambda: done):
        for item in items:
            yield item
            done += 1


def line(label: str, total: int, done: int, seconds: float, note: str = "", before: int = 0) -> str:
    """One log line: `synthesize  320/1280  41/s  0:23 left  loss 0.31`.

    The rate is of this run's `seconds`, so it leaves out what was done `before` it (a resumed run).
    """
    rate = (done - before) / seconds if seconds > 0 else 0.0
    parts = [label, f"{done}/{total}" if total else str(done)]
    if rate > 0:
        parts.append(f"{rate:.3g}/s")
    if rate > 0 and total > done:
        left = round((total - done) / rate)
        parts.append(f"{left // 60}:{left % 60:02d} left")
    return "  ".join([*parts, note] if note else parts)


@dataclass
class Estimate:
    """How long rows will take, said once, from what was done in a minute of work."""

    total: int
    gpus: float
    """That are busy meanwhile."""
    begin: int | None = None
    """Rows that were there before."""
    first: tuple[int, float] | None = None
    """Rows, and the time, when the first results were there."""
    said: bool = False

    def update(self, rows: int, now: float) -> str:
        """Take the rows so far and the time in seconds; return the estimate, else nothing."""
        if self.begin is None:
            self.begin = rows
        if self.first is None:
            self.first = (rows, now) if rows > self.begin else None
            return ""
        before, then = self.first
        if self.said or now - then < ESTIMATE_S or not before < rows < self.total:
            return ""
        self.said = True
        rate = (rows - before) / (now - then)
        hours = (self.total - rows) / rate / 3600
        text = f"{self.total - rows} rows at {rate:.3g}/s take {hours:.2g} hours more"
        return f"{text}, {hours * self.gpus:.2g} GPU hours" if self.gpus else text


class _Look:
    """What was done and noted when it could be read last."""

    def __init__(self, done: Callable[[], int], note: Callable[[], str]) -> None:
        self.done, self.note = done, note
        self.last = 0, ""

    def __call__(self) -> tuple[int, str]:
        """Read it again; to look never ends the work."""
        with contextlib.suppress(OSError):
            self.last = self.done(), self.note()
        return self.last


def _lines(label: str, total: int, look: _Look, finished: threading.Event, _: Console) -> None:
    began, (before, _note) = time.monotonic(), look()  # a resumed run begins above zero
    last = False
    while not last:
        last = finished.wait(LINE_S)
        seconds = time.monotonic() - began
        done, note = look()
        _log.info("%s", line(label, total, done, seconds, note, before))


def _bar(label: str, total: int, look: _Look, finished: threading.Event, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total or None, completed=look()[0], note="")
        last = False
        while not last:
            last = finished.wait(BAR_S)
            done, note = look()
            bar.update(task, completed=done, note=note)
