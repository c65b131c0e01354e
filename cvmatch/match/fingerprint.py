"""A matcher's fingerprint in parts, so that a change redoes only what it must.

tile    the tower of tiles and W1c: u of every tile
tail    what follows FFN_C's first layer: scores, and the shortlist
query   everything else: queries, and the shortlist
"""

from cvmatch.data import manifest
from cvmatch.match.model import JointFeatureLearningNet

_TILE = ("aerial_tower.", "candidate_tile.")
_TAIL = ("candidate_rest.",)
_TILE_CONFIG = ("aerial", "view", "polar", "square", "preprocess", "format")


def identity(directory: str) -> dict[str, str]:
    """SHA-256 (hex) of each part of the matcher in a directory, whatever its files are called.

    Raises:
        ValueError: no matcher there, or one of another format or preprocessing version.
    """
    config = JointFeatureLearningNet.config_of(directory).plain()
    tile = [config[name] for name in _TILE_CONFIG]
    found: dict[str, list] = {"tile": [tile], "tail": [], "query": [config]}
    for name, line in sorted(manifest.tensors(directory).items()):
        found[_part(name)].append(line)
    return {name: manifest.digest(lines) for name, lines in found.items()}


def _part(name: str) -> str:
    if name.startswith(_TILE):
        return "tile"
    return "tail" if name.startswith(_TAIL) else "query"
