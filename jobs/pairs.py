"""Run `cvmatch pairs`: `ray job submit ... -- python jobs/pairs.py`."""

from cvmatch.cli import main

main("pairs")
