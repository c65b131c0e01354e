"""Peak memory of this process, all it started, and Ray's object store (Linux)."""

import contextlib
import os
import threading
from collections.abc import Iterator

SAMPLE_S = 1.0
"""Seconds between looks."""


class PeakMemory:
    """Largest sum so far."""

    mib: float = 0.0
    """MiB; pages that processes share, as the object store's, are counted once."""


@contextlib.contextmanager
def watch_memory(field: str = "Pss") -> Iterator[PeakMemory]:
    """The peak while the block runs; with "Pss_Anon" without the pages of mapped files."""
    peak, finished = PeakMemory(), threading.Event()

    def look() -> None:
        while not finished.wait(SAMPLE_S):
            peak.mib = max(
                peak.mib,
                sum(_read_size(pid, field) for pid in list_descendants(os.getpid())) / 1024,
            )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        finished.set()
        thread.join()


def list_descendants(root: int) -> list[int]:
    """`root` and the processes below it."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        # "pid (name) state parent ...": the name may hold spaces and brackets.
        stat = _read(f"/proc/{name}/stat").rpartition(")")[2].split()
        if stat:
            children.setdefault(int(stat[1]), []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _read_size(pid: int, field: str) -> int:
    """KiB of a process; of a page that n processes map, an n-th."""
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


def _read(path: str) -> str:
    """A file of a process, empty if that has ended."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""
