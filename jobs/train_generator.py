"""Fine-tune the generator on pairs: `python jobs/train_generator.py --data.root CVUSA`."""

import json
import logging

from cvmatch import engine
from cvmatch.config import parse
from cvmatch.generate.train import TrainGenerator, train

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse(TrainGenerator)
    engine.start()
    result = train(config)
    print(json.dumps({"model": config.output, **(result.metrics or {})}))
