"""Run `cvmatch tune` on a cluster (`ray job submit ... -- python jobs/tune.py`)."""

from cvmatch.cli import main

main("tune")
