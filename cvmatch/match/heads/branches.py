"""Branches: each compares one thing of the query with one of the tile, and their cosines are added.

A weighted sum of the cosines of small embeddings is one inner product, so a tile has a vector of
its own: its embeddings, one behind the other.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cvmatch.data import storage
from cvmatch.match.settings import BRANCHES_OF, MODALITIES, Branch, Head, Modality
from cvmatch.nn import metrics
from cvmatch.runtime import hardware

FUSION = "fusion.json"
"""File of a model directory: weights of the branches' cosines."""

LUMINANCE_CELLS, CHROMA_CELLS = 16, 8
"""Cells a side of the planes of a layout."""

LAYOUT_WIDTH = LUMINANCE_CELLS**2 + 2 * CHROMA_CELLS**2
"""Numbers of a layout."""

_FEW = 4  # queries that are scored one after the other

_CHROMA_SHARE = 0.25  # of a layout's score: docs/decisions.md#layout


GROUND_ONLY = (
    "matcher: trained on G alone (branch direct), expected queries of modality G, got A or S. "
    "Pass --modalities G (cvmatch evaluate), leave the generator out, or train it with --branches "
    "direct layout."
)
"""Why a model without a branch for A refuses a query."""


class Features(NamedTuple):
    """What is known of queries, or of tiles, in front of the heads; None where it is not."""

    ground: Float[Tensor, "row g"] | None = None
    """g of panoramas."""
    aerial: Float[Tensor, "row a"] | None = None
    """a of synthetic aerials, or c of tiles."""
    mask: Float[Tensor, "row s"] | None = None
    """s of class maps."""
    layout: Float[Tensor, "row l"] | None = None
    """`embed_layout` of synthetic aerials or of tiles."""

    def only(self, modality: Modality) -> "Features":
        """Return those of the pictures that a modality names."""
        letters = modality.split("+")
        return Features(
            self.ground if "G" in letters else None,
            self.aerial if "A" in letters else None,
            self.mask if "S" in letters else None,
            self.layout if "A" in letters else None,
        )

    @property
    def modality(self) -> Modality:
        """Which pictures there are of a query.

        Raises:
            ValueError: none that a query may consist of.
        """
        known = {
            "G": self.ground is not None,
            "A": self.aerial is not None or self.layout is not None,
            "S": self.mask is not None,
        }
        name = "+".join(letter for letter, there in known.items() if there)
        for modality in MODALITIES:
            if modality == name:
                return modality
        raise ValueError(f"matcher: expected a query of one of {MODALITIES}, got {name!r}.")


@dataclasses.dataclass(frozen=True)
class FusionWeights:
    """Weights of the branches' cosines for each modality of a query; they sum to 1."""

    weights: Mapping[Modality, Mapping[str, float]]
    temperature: Mapping[Modality, float] = dataclasses.field(default_factory=dict)
    """What a score is divided by in the softmax over tiles that was fitted."""
    pairs: int = 0
    """Held-out pairs that they were fitted on; 0: they are the training's own temperatures."""

    def save(self, directory: str) -> None:
        """Write `fusion.json`."""
        storage.write_json(storage.join(directory, FUSION), dataclasses.asdict(self))

    @classmethod
    def load(cls, directory: str) -> "FusionWeights":
        """Read what `save` wrote."""
        return cls(**storage.read_json(storage.join(directory, FUSION)))

    @classmethod
    def equal(cls, branches: tuple[Branch, ...]) -> "FusionWeights":
        """Return equal weights."""
        return cls.normalised(dict.fromkeys(branches, 1.0))

    @classmethod
    def normalised(cls, scales: Mapping[str, float]) -> "FusionWeights":
        """Return weights in the proportion of `scales`, for every modality."""
        weights: dict[Modality, Mapping[str, float]] = {}
        for modality in MODALITIES:
            used = {b: scales[b] for b in BRANCHES_OF[modality] if b in scales}
            if total := sum(used.values()):
                weights[modality] = {b: value / total for b, value in used.items()}
        return cls(weights)


class ResidualMLP(nn.Module):
    """Map what a head's first layer returns: x + W3 relu(W2 relu(x) + b2) + b3, unit norm.

    The skip makes a head start as a linear one (docs/decisions.md#residual-heads).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*row hidden"]) -> Float[Tensor, "*row hidden"]:
        """Return the embedding, of unit norm."""
        return nn.functional.normalize(x + self.last(self.middle(x.relu()).relu()), dim=-1)


class UnitNorm(nn.Module):
    """Scale features to unit norm: the embedding of a model without heads."""

    def forward(self, x: Float[Tensor, "*row hidden"]) -> Float[Tensor, "*row hidden"]:
        """Return the embedding, of unit norm."""
        return nn.functional.normalize(x, dim=-1)


class BranchHeads(nn.Module):
    """Embeddings of each branch, and the weighted sum of their cosines.

    Args:
        branches: Which there are, in the order of the vectors' parts.
        ground: Width of g.
        aerial: Width of a, and of c.
        hidden: Width of each learned embedding.
        head: What makes them; none: they are the features, scaled to unit norm.

    Raises:
        ValueError: features are not as wide as the embeddings that they are to be.
    """

    def __init__(
        self,
        branches: tuple[Branch, ...],
        ground: int,
        aerial: int,
        hidden: int,
        head: Head = "residual",
    ) -> None:
        super().__init__()
        if head == "none" and (ground, aerial) != (hidden, hidden):
            raise ValueError(
                "matcher: without heads, embeddings are the towers' features: expected hidden "
                f"{hidden} of both, got {ground} of G and {aerial} of C. Set hidden to their width."
            )
        self.branches, self.hidden = branches, hidden
        inputs = {"direct": ground, "aerial": aerial}
        learned = [branch for branch in branches if branch in inputs]
        self.query = nn.ModuleDict({name: _head(inputs[name], hidden, head) for name in learned})
        self.tile = nn.ModuleDict({name: _head(aerial, hidden, head) for name in learned})
        self.weights = FusionWeights.equal(branches)

    @property
    def widths(self) -> dict[str, int]:
        """Numbers of each branch's part of a vector."""
        return branch_widths(self.branches, self.hidden)

    def tile_parts(self, tiles: Features) -> dict[str, Float[Tensor, "tile _"]]:
        """Return the unit embeddings of tiles."""
        features = {"direct": tiles.aerial, "aerial": tiles.aerial, "layout": tiles.layout}
        return self._parts(self.tile, features)

    def query_parts(self, queries: Features) -> dict[str, Float[Tensor, "query _"]]:
        """Return the unit embeddings of queries, of the branches whose pictures are there."""
        features = {"direct": queries.ground, "aerial": queries.aerial, "layout": queries.layout}
        return self._parts(self.query, features)

    def embed_tiles(self, tiles: Features) -> Float[Tensor, "tile width"]:
        """Return a tile's vector: its embeddings, one behind the other."""
        return torch.cat(list(self.tile_parts(tiles).values()), dim=1)

    def embed_queries(self, queries: Features) -> Float[Tensor, "query width"]:
        """Return vectors whose product with a tile's is the score; zero where nothing is known."""
        parts, weights = self.query_parts(queries), self._weights(queries.modality)
        first = next(iter(parts.values()))
        return torch.cat(
            [
                parts[name] * weights.get(name, 0.0)
                if name in parts
                else first.new_zeros(len(first), width)
                for name, width in self.widths.items()
            ],
            dim=1,
        )

    def _weights(self, modality: Modality) -> Mapping[str, float]:
        if modality not in self.weights.weights:
            raise ValueError(
                f"matcher: its branches {self.branches} know nothing of a query of {modality}: "
                "train it with the branch direct (--branches)."
            )
        return self.weights.weights[modality]

    def _parts(
        self, heads: nn.ModuleDict, features: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        return {
            name: heads[name](feature).float() if name in heads else feature
            for name in self.branches
            if (feature := features[name]) is not None
        }


class SumScorer:
    """Inner products: the weighted sum of the branches' cosines."""

    def __init__(self, parts: Mapping[str, int], device: torch.device | str = "cpu") -> None:
        """`parts`: names and widths of the branches' parts of a vector."""
        self.parts = dict(parts)
        self.width = self.shortlist_width = sum(self.parts.values())
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        """Where the queries have to be."""
        return self._device

    @torch.no_grad()
    def __call__(
        self,
        query: Float[Tensor, "query width"],
        tile: Float[Tensor, "tile width"],
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "query tile"]:
        """Return query x tile products; in float16 a query at a time."""
        if dtype == torch.float16:
            products = [torch.mv(tile.half(), one) for one in query.half()]
            return torch.stack(products).float()
        return (query.to(dtype) @ tile.to(dtype).T).float()

    def fastest_dtype(self, queries: int) -> torch.dtype:
        """Return the type in which this many queries are scored first.

        Tiles are stored in float16, and a CPU reads them as they are for the product with one
        vector: docs/decisions.md#exact-search-in-half-precision.
        """
        few = self.device.type == "cpu" and 0 < queries <= _FEW
        return torch.float16 if few else hardware.fastest_dtype(self.device)

    @torch.no_grad()
    def split(
        self, query: Float[Tensor, " width"], tile: Float[Tensor, "tile width"]
    ) -> dict[str, Float[Tensor, " tile"]]:
        """Return what each branch adds to the scores of one query."""
        products = (query.float() * tile.float()).split([*self.parts.values()], dim=1)
        return {name: part.sum(dim=1) for name, part in zip(self.parts, products, strict=True)}


def fit_weights(cosines: Mapping[str, Float[Tensor, "pair tile"]]) -> FusionWeights:
    """Fit the weights of each modality by the cross entropy of each query among all tiles.

    Convex in the weights over the temperature, which are at least 0.

    Args:
        cosines: Of queries (rows) and tiles (columns), by each branch; own tiles on the diagonal,
            others behind them. None of the pairs was trained on.
    """
    weights: dict[Modality, Mapping[str, float]] = {}
    temperature: dict[Modality, float] = {}
    pairs = 0
    for modality in MODALITIES:
        used = {branch: cosines[branch] for branch in BRANCHES_OF[modality] if branch in cosines}
        if used:
            weights[modality], temperature[modality] = fit_shares(used)
            pairs = len(next(iter(used.values())))
    return FusionWeights(weights, temperature, pairs)


def fit_shares(
    cosines: Mapping[str, Float[Tensor, "pair tile"]],
) -> tuple[dict[str, float], float]:
    """Fit the weights of all these branches, as `fit_weights`; returns also the temperature."""
    from scipy import optimize  # noqa: PLC0415 (a second, which a search does not need)

    stack = np.stack([values.double().cpu().numpy() for values in cosines.values()])
    logits = optimize.minimize(
        _cross_entropy,
        [10.0] * len(stack),
        stack,
        "L-BFGS-B",
        jac=True,
        bounds=[(0.0, None)] * len(stack),
    ).x
    total = max(float(logits.sum()), 1e-6)
    shares = logits / total if logits.any() else np.full(len(stack), 1 / len(stack))
    return dict(zip(cosines, shares.tolist(), strict=True)), 1 / total


def _cross_entropy(
    logits: Float[np.ndarray, " branch"], cosines: Float[np.ndarray, "branch query tile"]
) -> tuple[float, Float[np.ndarray, " branch"]]:
    """Return the mean cross entropy of own pairs, and its gradient."""
    from scipy import special  # noqa: PLC0415 (as above)

    score = np.tensordot(logits, cosines, 1)
    log_sum = np.asarray(special.logsumexp(score, axis=1))
    share = np.exp(score - log_sum[:, None])
    own = np.diagonal(cosines, axis1=1, axis2=2)  # as many as there are queries
    gradient = (share * cosines).sum(axis=2) - own
    return float((log_sum - np.diagonal(score)).mean()), gradient.mean(axis=1)


def branch_widths(branches: tuple[Branch, ...], hidden: int) -> dict[str, int]:
    """Return the numbers of each branch's embedding."""
    return {name: LAYOUT_WIDTH if name == "layout" else hidden for name in branches}


@torch.no_grad()
def embed_layout(tile: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n layout"]:
    """Return luminance and chroma of pictures in [0, 1] at low resolution, of unit norm.

    The product of two is a weighted mean of the correlations (`metrics.ncc`) of their planes. It
    needs exact north and scale, and nothing of it is trained.
    """
    luminance = metrics.standardize(metrics.planes(tile, "luminance", LUMINANCE_CELLS))
    chroma = metrics.standardize(metrics.planes(tile, "chroma", CHROMA_CELLS))
    shares = (1 - _CHROMA_SHARE) ** 0.5, _CHROMA_SHARE**0.5
    return torch.cat([luminance * shares[0], chroma * shares[1]], dim=1)


def _head(inputs: int, hidden: int, head: Head) -> nn.Module:
    if head == "none":
        return UnitNorm()
    return nn.Sequential(nn.Linear(inputs, hidden), ResidualMLP(hidden))
