"""Run `cvmatch train-segmenter` on a cluster (`ray job submit ... -- python jobs/train_segmenter.py`)."""

from cvmatch.cli import main

main("train-segmenter")
