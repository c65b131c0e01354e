"""Fine-tune the generator on pairs: `python jobs/train_generator.py --data.root CVUSA`."""

import json

from cvmatch.config import parse
from cvmatch.generate.settings import TrainGenerator
from cvmatch.generate.train import train
from cvmatch.runtime import progress, session

if __name__ == "__main__":
    progress.to_console()
    config = parse(TrainGenerator)
    session.start()
    result = train(config)
    print(json.dumps({"model": config.output, **(result.metrics or {})}))
