"""How much of the exact answer a shortlist holds."""

from typing import Any

import numpy as np
import torch

from cvmatch.index.ranking import rank
from cvmatch.index.reader import Index, opened
from cvmatch.match.fusion import Query

_QUERIES = 16  # queries a step


def measured(root: str, info: dict[str, Any], query: Query) -> dict[str, float]:
    """`recall` of a version that is not published yet."""
    return recall(opened(root, info), query)


@torch.inference_mode()
def recall(index: Index, query: Query) -> dict[str, float]:
    """Share, in [0, 1], of the exact model's best 1 and best 10 tiles that the shortlist holds."""
    best = min(10, len(index) - len(index.dead))
    found = torch.zeros(len(query.query_proj), best, dtype=torch.bool)
    for begin in range(0, len(found), _QUERIES):
        part = query.rows(slice(begin, begin + _QUERIES))
        exact = rank(index, part, best, "exact").rows
        for at, (rows, kept) in enumerate(zip(exact, index.nearest(part), strict=True), begin):
            found[at] = torch.from_numpy(np.isin(rows, kept))
    top = {"top1": found[:, 0].double().mean().item(), "top10": found.double().mean().item()}
    return top | {"shortlist": index.manifest["shortlist"], "queries": len(found)}
