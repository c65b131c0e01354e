"""Run `cvmatch train-segmenter`: `ray job submit ... -- python jobs/train_segmenter.py`."""

from cvmatch.cli import main

main("train-segmenter")
