"""Run `cvmatch demo`: `ray job submit ... -- python jobs/demo.py`."""

from cvmatch.cli import main

main("demo")
