"""Run `cvmatch search`: `ray job submit ... -- python jobs/search.py`."""

from cvmatch.cli import main

main("search")
