"""Train the matcher on rows of jobs/synthesize.py: `--pairs data/synthesized/train`."""

import json

from cvmatch import engine, progress
from cvmatch.config import parse
from cvmatch.match.train import TrainMatcher, train

if __name__ == "__main__":
    progress.to_console()
    config = parse(TrainMatcher)
    engine.start()
    result = train(config)
    print(json.dumps({"model": config.output, **(result.metrics or {})}))
