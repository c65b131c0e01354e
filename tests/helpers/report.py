"""Examples of a page, with plain pictures."""

import numpy as np

from cvmatch.report.examples import Example, Tile


def plain(colour, size=(8, 8)):
    return np.full((*size, 3), colour, dtype=np.uint8)


def example(pair_id="0000007", top=("0000003", "0000007"), **changes):
    given = {
        "pair_id": pair_id,
        "ground": plain((10, 20, 30), (8, 32)),
        "synthetic": plain((40, 50, 60)),
        "classes": np.full((8, 8), 2, dtype=np.uint8),
        "aerial": plain((70, 80, 90)),
        "top": [
            name
            if isinstance(name, Tile)
            else Tile(pair_id=name, picture=plain((9 * i, 0, 0)), score=1 - i / 10)
            for i, name in enumerate(top)
        ],
    }
    return Example(**{**given, **changes})
