"""Run `cvmatch index`: `ray job submit ... -- python jobs/index.py`."""

from cvmatch.cli import main

main("index")
