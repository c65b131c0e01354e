"""Run `cvmatch train-matcher` on a cluster (`ray job submit ... -- python jobs/train_matcher.py`)."""

from cvmatch.cli import main

main("train-matcher")
