"""Run `cvmatch train-matcher`: `ray job submit ... -- python jobs/train_matcher.py`."""

from cvmatch.cli import main

main("train-matcher")
