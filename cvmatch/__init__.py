"""Find the satellite tile of a street panorama, by synthesis, segmentation and joint matching.

The stages, in pipeline order: `ingest`, `generate`, `segment`, `match`, `index`, `search`; and
around them `tune`, `evaluate`, `report`. `README.md` draws the pipeline and the tree.
"""

__version__ = "0.1.0"
