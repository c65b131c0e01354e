"""Search the settings of a stage's training: `python jobs/tune.py --stage matcher --trials 16`."""

import json

from cvmatch.config import parse
from cvmatch.runtime import progress
from cvmatch.tune.run import Tune, search

if __name__ == "__main__":
    progress.to_console()
    config = parse(Tune)
    found = search(config)
    best = {"params": found.params, found.metric: found.value, "trials": len(found.trials)}
    print(json.dumps({"output": config.output, **best}))
