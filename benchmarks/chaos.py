"""Faults drawn from a seed, over jobs on a cluster of four nodes: what is lost, and how it goes on.

The cluster is that of tests/cluster: network namespaces of one machine, so root is needed.
"""

import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _harness import Bench, fill_sizes, parse_flags, write_results

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from cvmatch.data import manifest, schema, storage, tables
from cvmatch.index import versions
from cvmatch.runtime import progress
from tests.helpers.cluster import BUCKET, HEAD, WORKERS, Cluster, Job, run_cluster
from tests.helpers.toys import Toys, make_toys

TRIES = 4
"""How often the same command is given at most."""


@dataclass(frozen=True, kw_only=True)
class ChaosBench(Bench):
    """Break things while jobs run, and compare what they wrote with an undisturbed run's."""

    faults: int = 0
    """0: 100, quick 10."""
    seed: int = 0
    """Of what breaks, where and when."""


@dataclass(frozen=True)
class Work:
    """A kind of job."""

    command: Callable[[str], list[str]]
    """Of an output."""
    begun: str
    """What its log says when it is in the midst of it."""
    content: Callable[[str], Any]
    """What it wrote, whatever its files are called."""


@dataclass(frozen=True)
class Outcome:
    """What a fault did."""

    work: str
    fault: str
    again: int
    """How often the command was given once more."""
    seconds: float
    """From the fault to the end of the job, the commands that were given again included."""
    same: bool
    """Whether the content is that of the undisturbed run."""
    lost: int
    doubled: int
    """Rows."""


def make_works(toys: Toys, rows: str, index: str) -> dict[str, Work]:
    """Return the kinds of job, on the rows and the index of undisturbed runs."""
    return {
        "synthesize": Work(toys.synthesize, "synthesize  ", read_rows),
        "build_index": Work(
            lambda output: toys.build_index(rows, output), "embed tiles  ", read_index
        ),
        "search_rows": Work(
            lambda output: toys.search_rows(rows, index, output), "search  ", read_rows
        ),
        "train_segmenter": Work(
            lambda output: toys.train(output.rpartition("/")[2], "--output", output),
            "train ",
            manifest.fingerprint,
        ),
    }


def read_rows(location: str) -> list[dict[str, Any]]:
    """Read the rows of a directory, in the order of their ids."""
    names = tables.inspect(location)[0].columns.names
    found = [row for table in tables.batches(location, names) for row in table.to_pylist()]
    return sorted(found, key=lambda row: row[schema.PAIR_ID])


def read_index(location: str) -> list[str]:
    """Read the content hashes of an index's shards and codes."""
    root = versions.fetch(location)
    files = versions.read_version(root).files
    return sorted(f"{n} {i.sha256}" for n, i in files.items() if n.startswith(("shards/", "codes")))


def kill_worker(cluster: Cluster, _: random.Random, node: str) -> None:
    """Kill the process of a node that has computed most."""
    script = "ps -eo pid,time,args --sort=-time | grep 'ray::' | grep -v grep | head -1"
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.on(node, "bash", "-c", f"kill -9 $({script} | awk '{{print $1}}')")


def kill_node(cluster: Cluster, _: random.Random, node: str) -> None:
    """Kill a node, and start it again."""
    cluster.kill_node(node)
    cluster.start_node(node)


def kill_driver(cluster: Cluster, _: random.Random, node: str) -> None:
    """Kill the driver of the job."""
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.on(HEAD, "pkill", "-9", "-f", "^python jobs/")


def refuse_all(cluster: Cluster, draw: random.Random, _: str) -> None:
    """Let the store refuse everything for 5 to 60 s."""
    cluster.refuse("503")
    time.sleep(draw.uniform(5, 60))
    cluster.refuse("ok")


def refuse_some(cluster: Cluster, _: random.Random, __: str) -> None:
    """Let the store refuse a request of twenty, until the job ends."""
    cluster.refuse("0.05")


def stop_tracking(cluster: Cluster, draw: random.Random, _: str) -> None:
    """Take MLflow's server away for 5 to 60 s."""
    cluster.stop("mlflow")
    time.sleep(draw.uniform(5, 60))
    cluster.start_tracking()


FAULTS = {
    "worker killed": kill_worker,
    "node killed": kill_node,
    "driver killed": kill_driver,
    "store away, 5 to 60 s": refuse_all,
    "5 % of requests refused": refuse_some,
    "MLflow away, 5 to 60 s": stop_tracking,
}


def try_fault(
    cluster: Cluster, work: Work, name: str, fault: str, draw: random.Random, output: str, true: Any
) -> Outcome:
    """Begin a job, break something in the midst of it, and give its command until it is done."""
    job = cluster.submit(*work.command(output))
    _wait_for(job, work.begun)
    time.sleep(draw.uniform(0, 10))
    broken = time.monotonic()
    breaking = threading.Thread(
        target=FAULTS[fault], args=(cluster, draw, draw.choice(list(WORKERS)))
    )
    breaking.start()
    job.wait()
    again = 0
    while job.code and again < TRIES:
        again += 1
        job = cluster.run(*work.command(output))
    breaking.join()
    cluster.refuse("ok")
    seconds = time.monotonic() - broken
    if job.code:
        print(job.log[-3000:], file=sys.stderr)
    found = work.content(output) if not job.code else []
    lost, doubled = _count_rows(found, true)
    cluster.wait_for_nodes(1 + len(WORKERS))
    return Outcome(name, fault, again, seconds, found == true, lost, doubled)


def _count_rows(found: Any, true: Any) -> tuple[int, int]:
    """Return how many rows lack, and how many are there twice."""
    if not isinstance(true, list) or not isinstance(true[0], dict):
        return int(not found), 0
    ids = [row[schema.PAIR_ID] for row in found]
    lost = {row[schema.PAIR_ID] for row in true} - set(ids)
    return len(lost), len(ids) - len(set(ids))


def _wait_for(job: Job, text: str) -> None:
    """Wait until a job is in the midst of its work, or has ended already."""
    while text not in job.log and job.process.poll() is None:
        time.sleep(0.5)


@contextlib.contextmanager
def start_cluster() -> Iterator[tuple[Cluster, Toys]]:
    """Start the cluster, with the toys in its store."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, run_cluster(Path(folder)) as nodes:
        os.environ |= nodes.access
        made = os.path.join(folder, "toys")
        os.makedirs(made)
        yield nodes, make_toys(made, f"s3://{BUCKET}")


def main(bench: ChaosBench) -> None:
    """Try each fault, and count."""
    bench = fill_sizes(bench, {"faults": 10 if bench.quick else 100})
    draw = random.Random(bench.seed)
    outcomes: list[Outcome] = []
    with start_cluster() as (cluster, toys):
        base = f"{toys.bucket}/undisturbed"
        works = make_works(toys, f"{base}/synthesize", f"{base}/build_index")
        truth = {}
        for name, work in works.items():
            job = cluster.run(*work.command(f"{base}/{name}"))
            if job.code:
                raise RuntimeError(f"{name} failed undisturbed:\n{job.log[-3000:]}")
            truth[name] = work.content(f"{base}/{name}")
        with progress.watch("faults", bench.faults, lambda: len(outcomes)):
            for number in range(bench.faults):
                name, fault = draw.choice(list(works)), draw.choice(list(FAULTS))
                output = f"{toys.bucket}/tried/{number}-{name}"
                outcomes.append(
                    try_fault(cluster, works[name], name, fault, draw, output, truth[name])
                )
                storage.remove(output)
    report(bench, outcomes)


def report(bench: ChaosBench, outcomes: list[Outcome]) -> None:
    """Write the table, a row a fault."""
    rows = []
    for fault in FAULTS:
        had = [one for one in outcomes if one.fault == fault]
        if had:
            seconds = [one.seconds for one in had]
            rows.append(
                {
                    "fault": fault,
                    "jobs": len(had),
                    "went on by itself": sum(not one.again for one in had),
                    "command given again": sum(one.again for one in had),
                    "rows lost": sum(one.lost for one in had),
                    "rows doubled": sum(one.doubled for one in had),
                    "content differs": sum(not one.same for one in had),
                    "s to the end, median": statistics.median(seconds),
                    "s to the end, longest": max(seconds),
                }
            )
    figures = {
        "faults": len(outcomes),
        "lost": sum(one.lost for one in outcomes),
        "doubled": sum(one.doubled for one in outcomes),
        "differs": sum(not one.same for one in outcomes),
        "again": sum(one.again for one in outcomes),
        "median_s": statistics.median(one.seconds for one in outcomes),
        "longest_s": max(one.seconds for one in outcomes),
    }
    notes = (
        "Each fault is in the midst of a job of synthesize, build_index, search_rows or "
        "train_segmenter, on 24 pairs of 64 x 64 pixels, on a cluster of a head without CPUs and "
        "three workers, with an S3 store and an MLflow server, all on this machine. A killed node "
        "starts again at once. The content is that of the rows, of the index's shards and codes, "
        "or of the model's weights. Seconds are from the fault to the end of the job.",
    )
    write_results(bench, "Chaos", rows, figures, notes)


if __name__ == "__main__":
    main(parse_flags(ChaosBench))
