"""Measure a matcher, its index and the models behind its queries, on unseen pairs."""

import json
import sys

from cvmatch.config import parse
from cvmatch.data import storage
from cvmatch.evaluate.run import evaluate
from cvmatch.evaluate.settings import Evaluate
from cvmatch.report import evaluation, score_table, scores
from cvmatch.runtime import progress

if __name__ == "__main__":
    progress.to_console()
    config = parse(Evaluate)
    results = evaluate(config)
    page = evaluation(config.output, config.queries, config.seed)
    print(score_table(scores(results), "Evaluation"), file=sys.stderr)
    print(f"page  {storage.absolute(page)}", file=sys.stderr)
    print(json.dumps(results))
