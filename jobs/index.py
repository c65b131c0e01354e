"""Run `cvmatch index` on a cluster (`ray job submit ... -- python jobs/index.py`)."""

from cvmatch.cli import main

main("index")
