"""Run `cvmatch train-generator`: `ray job submit ... -- python jobs/train_generator.py`."""

from cvmatch.cli import main

main("train-generator")
