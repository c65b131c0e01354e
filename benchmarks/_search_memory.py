"""Opens an index, answers queries one by one, and prints its own private memory (Linux).

Twice: alone, and forked from a process that has imported the libraries, as the processes of a
search service are.
"""

import json
import multiprocessing
import sys
import time

import torch

from cvmatch.index import versions
from cvmatch.index.reader import Index, rank


def read_private_memory() -> float:
    """MiB of pages that are no copy of a file and no other process's: what one more takes."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        sizes = {words[0]: words[1] for words in map(str.split, file) if len(words) == 3}
    return int(sizes["Private_Dirty:"]) / 1024


def search(root: str, place: str) -> dict[str, float]:
    """Private memory before and after the queries, and milliseconds to open the index."""
    query = torch.load(place, weights_only=True)
    imports = read_private_memory()
    begin = time.perf_counter()
    info = versions.read_version(root)
    versions.check_files(root, info.files)
    check = time.perf_counter() - begin
    begin = time.perf_counter()
    index = Index.open(root)
    opened = time.perf_counter() - begin
    for at in range(len(query)):
        rank(index, query[at : at + 1], 10, "two-stage")
    return {
        "private_mib": read_private_memory(),
        "imports_mib": imports,
        "open_ms": 1000 * opened,
        "check_ms": 1000 * check,
    }


def search_in_fork(root: str, place: str) -> float:
    """Private MiB of a process that shares what importing the libraries wrote."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([rank.__module__, Index.__module__])
    with forks.Pool(1) as pool:
        return pool.apply(search, (root, place))["private_mib"]


if __name__ == "__main__":
    print(json.dumps({"forked_mib": search_in_fork(*sys.argv[1:])} | search(*sys.argv[1:])))
