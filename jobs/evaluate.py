"""Measure a matcher, its index and the models behind its queries, on unseen pairs."""

import json

from cvmatch import progress
from cvmatch.config import parse
from cvmatch.evaluate import Evaluate, evaluate

if __name__ == "__main__":
    progress.to_console()
    print(json.dumps(evaluate(parse(Evaluate))))
