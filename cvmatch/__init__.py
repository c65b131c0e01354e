"""Find the satellite tile of a street panorama, by synthesis, segmentation and joint matching.

The stages, in pipeline order: `ingest`, `generate`, `segment`, `match`, `index`, `search`; and
around them `tune`, `evaluate`, `report`. `README.md` draws the pipeline and the tree.
"""

import os

# Ray reads it when imported. The warning is of no use, and goes to stdout, where jobs answer.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")

__version__ = "0.1.0"
