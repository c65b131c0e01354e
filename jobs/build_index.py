"""Embed all tiles of a gallery and publish them as the next version of an index."""

import json

from cvmatch.config import parse
from cvmatch.index.build import build
from cvmatch.index.settings import BuildIndex
from cvmatch.runtime import progress

if __name__ == "__main__":
    progress.to_console()
    config = parse(BuildIndex)
    info = build(config)
    shown = ("version", "rows", "hidden", "ann", "shortlist", "recall", "rejected")
    print(json.dumps({"index": config.output, **{name: info.get(name) for name in shown}}))
