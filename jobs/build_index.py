"""Run `cvmatch build-index`: `ray job submit ... -- python jobs/build_index.py`."""

from cvmatch.cli import main

main("build-index")
