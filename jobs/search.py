"""Find the tiles of panoramas: JSON lines of query, rank, tile, score, latitude, longitude."""

import json
import logging

from cvmatch import progress
from cvmatch.config import parse
from cvmatch.search import SearchFiles, search

if __name__ == "__main__":
    progress.to_console(logging.WARNING)
    for found in search(parse(SearchFiles)):
        print(json.dumps(found))
