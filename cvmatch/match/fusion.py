"""What scores need of a matcher beside its towers: the fusion heads, and the nulls.

`candidate = FFN_C([a; c])` uses the *query's* synthetic aerial, so a tile has no embedding of its
own. FFN_C's first layer is linear, hence W1 [a; c] + b1 = (W1c c) + (W1a a + b1) = tile_proj +
query_proj: a tile keeps `tile_proj`, a query computes `query_proj` once, and a pair costs two small
layers. Exact, and ~10^5 times faster than running the towers for each pair.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

ALONE = (
    "matcher: trained on G alone (w_joint 0), expected queries of modality G, got A or S. Pass "
    "--modalities G (jobs/evaluate.py), leave the generator out, or train it with w_joint."
)


class Query(NamedTuple):
    """What scoring needs of each query, whatever the number of tiles."""

    embedding: Float[Tensor, "query hidden"]
    """FFN_G([g; a; s]), unit norm."""
    query_proj: Float[Tensor, "query hidden"]
    """W1a a + b1: the query's part of FFN_C's first layer."""

    def rows(self, which: "slice | Tensor") -> "Query":
        """Some of the queries."""
        return Query(self.embedding[which], self.query_proj[which])


class ResidualMLP(nn.Module):
    """What follows the first layer of a fusion head: x + W3 relu(W2 relu(x) + b2) + b3, unit norm.

    The sum with x makes a head start as a linear one. Without it, G found C among 500 (`standard`
    world, InfoNCE, modality G) in 8 % after a CPU minute, and in 46 % after four; with it in 49 %
    after the first.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*row hidden"]) -> Float[Tensor, "*row hidden"]:
        """The embedding of what the first layer gave."""
        return nn.functional.normalize(x + self.last(self.middle(x.relu()).relu()), dim=-1)


class Fusion(nn.Module):
    """FFN_G, FFN_C, and learned nulls for an absent g, a or s, whose widths are given.

    `classes` 0: queries of G alone.
    """

    def __init__(self, ground: int, aerial: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.null_ground = nn.Parameter(torch.zeros(ground))
        self.null_synthetic = nn.Parameter(torch.zeros(aerial))
        self.null_classes = nn.Parameter(torch.zeros(classes))
        self.query_linear = nn.Linear(ground + aerial + classes, hidden)
        self.query_mlp = ResidualMLP(hidden)
        self.tile_linear = nn.Linear(aerial, hidden, bias=False)  # W1c
        self.query_aerial_linear = nn.Linear(aerial, hidden)  # W1a, b1
        self.candidate_mlp = ResidualMLP(hidden)
        # A and S start without a say, as new inputs of a pre-trained network do: G learns first.
        nn.init.zeros_(self.query_aerial_linear.weight)
        self.query_linear.weight.data[:, ground:] = 0

    @property
    def hidden(self) -> int:
        """Width of tile_proj, of query_proj and of the embeddings."""
        return self.tile_linear.out_features

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.null_ground.device

    def fuse(
        self,
        ground: Float[Tensor, "query g"] | None,
        synthetic: Float[Tensor, "query a"] | None,
        classes: Float[Tensor, "query s"] | None,
    ) -> Query:
        """Query from tower features; None stands for the learned null.

        Raises:
            ValueError: all three are None, or the model was trained on G alone and there is more.
        """
        given = [feature for feature in (ground, synthetic, classes) if feature is not None]
        if not given:
            raise ValueError(
                "a query needs at least one of ground, synthetic and classes, got none"
            )
        if not len(self.null_classes) and not (synthetic is None and classes is None):
            raise ValueError(ALONE)
        g = self.null_ground.expand(len(given[0]), -1) if ground is None else ground
        a = self.null_synthetic.expand(len(given[0]), -1) if synthetic is None else synthetic
        s = self.null_classes.expand(len(given[0]), -1) if classes is None else classes
        embedding = self.query_mlp(self.query_linear(torch.cat([g, a, s], dim=1)))
        return Query(embedding, self.query_aerial_linear(a))

    def joint(
        self, tile_proj: Float[Tensor, "*#pair hidden"], query_proj: Float[Tensor, "*#pair hidden"]
    ) -> Float[Tensor, "*pair hidden"]:
        """Candidate embedding FFN_C([a; c]) of pairs, unit norm, from its two halves."""
        return self.candidate_mlp(tile_proj + query_proj)

    def pair_scores(
        self, query: Query, tile_proj: Float[Tensor, "tile hidden"]
    ) -> Float[Tensor, "query tile"]:
        """Cosine of each query and each tile, each tile embedded with that query's own A.

        All pairs at once, with gradient; `score.joint_scores` is for many tiles.
        """
        candidate = self.joint(tile_proj[None], query.query_proj[:, None])
        return (candidate.float() * query.embedding[:, None].float()).sum(-1)

    def shortlist(self, tile_proj: Float[Tensor, "tile hidden"]) -> Float[Tensor, "tile hidden"]:
        """A tile's own embedding (unit norm), under the null synthetic aerial: what FAISS holds.

        Its product with a query of modality G is that modality's exact score.
        """
        query_proj = self.query_aerial_linear(self.null_synthetic)
        return self.joint(tile_proj, query_proj.expand(len(tile_proj), -1))
