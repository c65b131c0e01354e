"""Run `cvmatch search` on a cluster (`ray job submit ... -- python jobs/search.py`)."""

from cvmatch.cli import main

main("search")
