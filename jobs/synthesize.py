"""Draw and segment the synthetic aerial of every pair, in one streaming pass that can resume."""

import json
import logging

from cvmatch.config import parse
from cvmatch.synthesize import Synthesize, synthesize

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse(Synthesize)
    made = synthesize(config)
    print(json.dumps({"output": config.output, "rows": made["rows"], "models": made["models"]}))
