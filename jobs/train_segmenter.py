"""Fine-tune the segmenter on tiles and class maps: `python jobs/train_segmenter.py --data.root CVUSA`."""

import json
import logging

from cvmatch import engine
from cvmatch.config import parse
from cvmatch.segment.train import TrainSegmenter, train

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse(TrainSegmenter)
    engine.start()
    result = train(config)
    print(json.dumps({"model": config.output, **(result.metrics or {})}))
