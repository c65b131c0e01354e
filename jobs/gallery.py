"""Run `cvmatch gallery`: `ray job submit ... -- python jobs/gallery.py`."""

from cvmatch.cli import main

main("gallery")
