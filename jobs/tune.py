"""Search the settings of a stage's training: `python jobs/tune.py --stage matcher --trials 16`."""

import json
import logging

from cvmatch.config import parse
from cvmatch.tune import Tune, search

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse(Tune)
    found = search(config)
    best = {"params": found.params, config.metric: found.metric, "trials": len(found.trials)}
    print(json.dumps({"output": config.output, **best}))
