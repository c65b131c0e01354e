"""Train the matcher on rows of jobs/synthesize.py: `--pairs data/synthesized/train`."""

import json

from cvmatch.config import parse
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.train import train
from cvmatch.runtime import progress, session

if __name__ == "__main__":
    progress.to_console()
    config = parse(TrainMatcher)
    session.start()
    result = train(config)
    print(json.dumps({"model": config.output, **(result.metrics or {})}))
