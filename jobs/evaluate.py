"""Measure a matcher, its index and the models behind its queries, on unseen pairs."""

import json
import logging

from cvmatch.config import parse
from cvmatch.evaluate import Evaluate, evaluate

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(json.dumps(evaluate(parse(Evaluate))))
