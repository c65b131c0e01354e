"""Find the satellite tile of a street panorama, by synthesis, segmentation and joint matching.

The names below are those that a person uses in a notebook; each is loaded when it is first used:

    config = cvmatch.SearchFiles(panorama=("street.jpg",), index="data/index")
    for result in cvmatch.search_files(config):
        print(result.query, result.tiles[0])

The stages, in pipeline order: `generate`, `segment`, `match`, `index`, `search`; around them
`tune`, `evaluate`, `report`. `README.md` draws the pipeline, `docs/architecture.md` the tree.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvmatch.data.pairs import PairDataset
    from cvmatch.data.settings import Ingest
    from cvmatch.generate.model import Generator
    from cvmatch.index.reader import Index
    from cvmatch.match.model import Matcher
    from cvmatch.search.files import search_files
    from cvmatch.search.settings import SearchFiles
    from cvmatch.segment.model import Segmenter

__version__ = "0.1.0"

__all__ = [
    "Generator",
    "Index",
    "Ingest",
    "Matcher",
    "PairDataset",
    "SearchFiles",
    "Segmenter",
    "search_files",
]

_LOCATIONS = {
    "Generator": "cvmatch.generate.model",
    "Index": "cvmatch.index.reader",
    "Ingest": "cvmatch.data.settings",
    "Matcher": "cvmatch.match.model",
    "PairDataset": "cvmatch.data.pairs",
    "SearchFiles": "cvmatch.search.settings",
    "Segmenter": "cvmatch.segment.model",
    "search_files": "cvmatch.search.files",
}

# Ray reads these when it is imported. The warning is of no use, and goes to stdout, where commands
# answer; a driver under `uv run` would make every worker build an environment of its own.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'cvmatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_LOCATIONS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
