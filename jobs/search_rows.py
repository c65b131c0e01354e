"""Find the tiles of all rows of a synthesized data set, on a cluster."""

import json

from cvmatch.config import parse
from cvmatch.runtime import progress
from cvmatch.search.rows import search_rows
from cvmatch.search.settings import SearchRows

if __name__ == "__main__":
    progress.to_console()
    config = parse(SearchRows)
    print(json.dumps({"output": config.output, "rows": search_rows(config)["rows"]}))
