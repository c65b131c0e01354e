"""Fine-tune the generator on pairs: `python jobs/train_generator.py --data.root CVUSA`."""

import json

from cvmatch import engine, progress
from cvmatch.config import parse
from cvmatch.generate.train import TrainGenerator, train

if __name__ == "__main__":
    progress.to_console()
    config = parse(TrainGenerator)
    engine.start()
    result = train(config)
    print(json.dumps({"model": config.output, **(result.metrics or {})}))
