"""Find the tiles of panoramas: JSON lines of query, rank, tile, score, latitude, longitude."""

import json
import logging
import os
import webbrowser

from cvmatch.config import parse
from cvmatch.report.found import found
from cvmatch.runtime import progress
from cvmatch.search.files import search
from cvmatch.search.settings import SearchFiles

if __name__ == "__main__":
    progress.to_console(logging.WARNING)
    config = parse(SearchFiles)
    answers = []
    for answer in search(config):
        for tile in answer.tiles:
            print(json.dumps(tile))
        answers.append(answer)
    if page := config.page or ("search.html" if config.open else ""):
        place = found(answers, page, config.tiles)
        if config.open:
            webbrowser.open(f"file://{os.path.abspath(place)}" if "://" not in place else place)
