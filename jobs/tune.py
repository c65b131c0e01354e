"""Run `cvmatch tune`: `ray job submit ... -- python jobs/tune.py`."""

from cvmatch.cli import main

main("tune")
