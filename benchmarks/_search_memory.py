"""Opens an index, answers queries one by one, and prints its own private memory (Linux)."""

import json
import sys
import time

import torch

from cvmatch.index import versions
from cvmatch.index.ranking import rank
from cvmatch.index.reader import Index
from cvmatch.match.fusion import Query


def private() -> float:
    """MiB of pages that are no copy of a file: what one more such process takes."""
    found = 0
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith("Anonymous:"):
                found += int(line.split()[1])
    return found / 1024


if __name__ == "__main__":
    root, place = sys.argv[1:]
    query = Query(*torch.load(place, weights_only=True))
    imports = private()
    begin = time.perf_counter()
    info = versions.read(root)
    versions.check(root, info["files"])
    check = time.perf_counter() - begin
    begin = time.perf_counter()
    index = Index.open(root)
    opened = time.perf_counter() - begin
    for at in range(len(query.v)):
        rank(index, query.rows(slice(at, at + 1)), 10, "two-stage")
    print(
        json.dumps(
            {
                "private_mib": private(),
                "imports_mib": imports,
                "open_ms": 1000 * opened,
                "check_ms": 1000 * check,
            }
        )
    )
