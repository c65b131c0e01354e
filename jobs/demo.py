"""Run `cvmatch demo` on a cluster (`ray job submit ... -- python jobs/demo.py`)."""

from cvmatch.cli import main

main("demo")
