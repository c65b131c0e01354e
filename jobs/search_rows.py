"""Run `cvmatch search-rows`: `ray job submit ... -- python jobs/search_rows.py`."""

from cvmatch.cli import main

main("search-rows")
