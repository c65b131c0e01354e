"""Fine-tune the segmenter on tiles and class maps: `--data.root CVUSA_subset`."""

import json

from cvmatch.config import parse
from cvmatch.runtime import progress, session
from cvmatch.segment.settings import TrainSegmenter
from cvmatch.segment.train import train

if __name__ == "__main__":
    progress.to_console()
    config = parse(TrainSegmenter)
    session.start()
    result = train(config)
    print(json.dumps({"model": config.output, **(result.metrics or {})}))
