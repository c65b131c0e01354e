"""Run `cvmatch build-index` on a cluster (`ray job submit ... -- python jobs/build_index.py`)."""

from cvmatch.cli import main

main("build-index")
