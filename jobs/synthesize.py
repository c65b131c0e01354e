"""Draw and segment the synthetic aerial of every pair, in one streaming pass that can resume."""

import json

from cvmatch.config import parse
from cvmatch.runtime import progress
from cvmatch.synthesize.run import synthesize
from cvmatch.synthesize.settings import Synthesize

if __name__ == "__main__":
    progress.to_console()
    config = parse(Synthesize)
    made = synthesize(config)
    print(json.dumps({"output": config.output, "rows": made["rows"], "models": made["models"]}))
