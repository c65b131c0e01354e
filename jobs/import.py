"""Run `cvmatch import`: `ray job submit ... -- python jobs/import.py`."""

from cvmatch.cli import main

main("import")
