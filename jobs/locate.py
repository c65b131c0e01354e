"""Run `cvmatch locate`: `ray job submit ... -- python jobs/locate.py`."""

from cvmatch.cli import main

main("locate")
