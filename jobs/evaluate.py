"""Run `cvmatch evaluate`: `ray job submit ... -- python jobs/evaluate.py`."""

from cvmatch.cli import main

main("evaluate")
