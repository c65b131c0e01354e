"""Run `cvmatch synthesize`: `ray job submit ... -- python jobs/synthesize.py`."""

from cvmatch.cli import main

main("synthesize")
