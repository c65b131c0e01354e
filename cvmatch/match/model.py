"""JointFeatureLearningNet: query (G, A, S) and candidate (A, C) -> scores, factorised over tiles.

`candidate = FFN_C([a; c])` uses the *query's* synthetic aerial, so a tile has no embedding of its
own. FFN_C's first layer is linear, hence W1 [a; c] + b1 = (W1c c) + (W1a a + b1) = u + v: a tile
keeps `u`, a query computes `v` once, and a pair costs two small layers. Exact, and ~10^5 times
faster than running the towers for each pair.
"""

import dataclasses
import json
import os
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvmatch import geometry, images
from cvmatch.schema import PALETTE
from cvmatch.towers import Tower, TowerSpec, normalise

Level = Literal["G", "G+A", "G+A+S", "A"]
LEVELS: tuple[Level, ...] = ("G", "G+A", "G+A+S", "A")
"""What a query may consist of; learned nulls stand in for the rest."""

View = Literal["polar", "square"]

_ALONE = (
    "matcher: trained on G alone (w_joint 0), expected queries of level G, got A or S. Pass "
    "--levels G (jobs/evaluate.py), leave the generator out, or train it with w_joint."
)
_TOWERS = ("ground", "aerial", "classes")
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_FORMAT = 2  # 1 had heads without a skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatcherConfig:
    """Sizes and towers of a matcher; its JSON is the `config.json` of a model directory."""

    ground: TowerSpec = dataclasses.field(default_factory=TowerSpec)
    """Tower of G."""
    aerial: TowerSpec = dataclasses.field(default_factory=TowerSpec)
    """Tower of both A and C; of G too where it is `shared`."""
    classes: TowerSpec = dataclasses.field(default_factory=TowerSpec)
    """Tower of S, which sees the class map in the palette's colours."""
    shared: bool = False
    """One tower for G, A and C (as Sample4Geo has it): `ground` is not used."""
    alone: bool = False
    """Only G against C: no tower of S, and no query with A or S."""
    view: View = "polar"
    """What the towers of A, C and S see: the tile's polar view (columns as in G), or the tile."""
    panorama: tuple[int, int] = (128, 512)
    """Height and width of G, in pixels."""
    polar: tuple[int, int] = (128, 512)
    """Height and width of the polar view, in pixels."""
    square: int = 256
    """Side to which tiles are decoded, in pixels."""
    hidden: int = 256
    """Width of the fusion layers, of the embeddings, and of `u` (2 bytes a number)."""
    preprocess: str = images.PREPROCESS
    """Version of decoding and resizing that the weights were trained with."""

    def __post_init__(self) -> None:
        if self.panorama[1] % 4:
            raise ValueError(
                f"panorama width must be a multiple of 4 (quarter turns), got {self.panorama}"
            )

    def plain(self) -> dict[str, object]:
        """What `MatcherConfig.read` takes."""
        towers = {name: getattr(self, name).plain() for name in _TOWERS}
        return json.loads(json.dumps(dataclasses.asdict(self))) | towers | {"format": _FORMAT}

    @classmethod
    def read(cls, plain: dict) -> "MatcherConfig":
        """The config of `plain`.

        Raises:
            ValueError: the weights are of another format, or were trained with another version of
                decoding and resizing.
        """
        plain = dict(plain)
        if (found := plain.pop("format", 1)) != _FORMAT:
            raise ValueError(
                f"matcher: {_CONFIG} has format {found}, this version reads {_FORMAT}. "
                "Train it again, or use the older version."
            )
        towers: dict = {name: TowerSpec.read(plain[name]) for name in _TOWERS}
        sizes = {name: tuple(plain[name]) for name in ("panorama", "polar")}  # JSON gives lists
        config = cls(**(plain | towers | sizes))  # pyright: ignore[reportArgumentType]
        if config.preprocess != images.PREPROCESS:
            raise ValueError(
                f"matcher: trained with pictures prepared by {config.preprocess!r}, but this "
                f"version prepares them by {images.PREPROCESS!r}. "
                "Train it again, or use the older version."
            )
        return config


class Query(NamedTuple):
    """What scoring needs of each query, whatever the number of tiles."""

    embedding: Float[Tensor, "query hidden"]
    """FFN_G([g; a; s]), unit norm."""
    v: Float[Tensor, "query hidden"]
    """W1a a + b1: the query's part of FFN_C's first layer."""

    def rows(self, which: "slice | Tensor") -> "Query":
        """Some of the queries."""
        return Query(self.embedding[which], self.v[which])


class Rest(nn.Module):
    """What follows the first layer of a fusion head: x + W3 relu(W2 relu(x) + b2) + b3, unit norm.

    The sum with x makes a head start as a linear one. Without it, G found C among 500 (`standard`
    world, InfoNCE, level G) in 8 % after a CPU minute, and in 46 % after four; with it in 49 %
    after the first.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*row hidden"]) -> Float[Tensor, "*row hidden"]:
        """The embedding of what the first layer gave."""
        return nn.functional.normalize(x + self.last(self.middle(x.relu()).relu()), dim=-1)


class JointFeatureLearningNet(nn.Module):
    """Towers for G, S and (one for both) A and C; FFN_G, FFN_C; nulls for an absent g, a or s.

    Where the config says so, one tower is shared by G, A and C, or there is none for S.
    """

    def __init__(
        self, config: MatcherConfig, towers: tuple[Tower, Tower, Tower] | None = None
    ) -> None:
        """`towers` for G, for A and C, and for S; untrained ones of `config` by default."""
        super().__init__()
        self.config = config
        specs = (config.ground, config.aerial, config.classes)
        ground, self.aerial_tower, classes = towers or tuple(Tower(spec) for spec in specs)
        self.ground_tower = None if config.shared else ground
        self.classes_tower = None if config.alone else classes
        g = a = self.aerial_tower.dim
        if self.ground_tower:
            g = self.ground_tower.dim
        s = self.classes_tower.dim if self.classes_tower else 0
        hidden = config.hidden
        self.null_ground = nn.Parameter(torch.zeros(g))
        self.null_synthetic = nn.Parameter(torch.zeros(a))
        self.null_classes = nn.Parameter(torch.zeros(s))
        self.query_first, self.query_rest = nn.Linear(g + a + s, hidden), Rest(hidden)
        self.candidate_tile = nn.Linear(a, hidden, bias=False)  # W1c
        self.candidate_query = nn.Linear(a, hidden)  # W1a, b1
        # A and S start without a say, as new inputs of a pre-trained network do: G learns first.
        nn.init.zeros_(self.candidate_query.weight)
        self.query_first.weight.data[:, g:] = 0
        self.candidate_rest = Rest(hidden)
        self.palette: Tensor
        palette = torch.zeros(256, 3)  # ignored pixels stay black
        palette[: len(PALETTE)] = torch.tensor(PALETTE) / 255
        self.register_buffer("palette", palette, persistent=False)

    def ground_features(self, ground: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n g"]:
        """g of panoramas in [0, 1]."""
        return _standard((self.ground_tower or self.aerial_tower)(normalise(ground)))

    def aerial_features(self, tile: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n a"]:
        """A or c of tiles in [0, 1]."""
        return _standard(self.aerial_tower(normalise(self._view(tile, "bilinear"))))

    def class_features(self, ids: UInt8[Tensor, "n s s"]) -> Float[Tensor, "n c"]:
        """S of maps of class ids, seen in the palette's colours.

        Raises:
            ValueError: the model was trained on G alone.
        """
        if self.classes_tower is None:
            raise ValueError(_ALONE)
        colours = self.palette[ids.int()].permute(0, 3, 1, 2)
        return _standard(self.classes_tower(normalise(self._view(colours, "nearest"))))

    def tile(self, aerial: Float[Tensor, "tile 3 s s"]) -> Float[Tensor, "tile hidden"]:
        """`u` = W1c c of tiles: all that is stored of them."""
        return self.candidate_tile(self.aerial_features(aerial))

    def query(
        self,
        ground: Float[Tensor, "query 3 h w"] | None = None,
        synthetic: Float[Tensor, "query 3 s s"] | None = None,
        classes: UInt8[Tensor, "query s s"] | None = None,
    ) -> Query:
        """Query from whatever there is of G, A (both in [0, 1]) and S (ids)."""
        return self.fuse(
            None if ground is None else self.ground_features(ground),
            None if synthetic is None else self.aerial_features(synthetic),
            None if classes is None else self.class_features(classes),
        )

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
        if self.config.alone and not (synthetic is None and classes is None):
            raise ValueError(_ALONE)
        g = self.null_ground.expand(len(given[0]), -1) if ground is None else ground
        a = self.null_synthetic.expand(len(given[0]), -1) if synthetic is None else synthetic
        s = self.null_classes.expand(len(given[0]), -1) if classes is None else classes
        embedding = self.query_rest(self.query_first(torch.cat([g, a, s], dim=1)))
        return Query(embedding, self.candidate_query(a))

    def joint(
        self, u: Float[Tensor, "*#pair hidden"], v: Float[Tensor, "*#pair hidden"]
    ) -> Float[Tensor, "*pair hidden"]:
        """Candidate embedding FFN_C([a; c]) of pairs, unit norm, from its two halves."""
        return self.candidate_rest(u + v)

    def pair_scores(
        self, query: Query, u: Float[Tensor, "tile hidden"]
    ) -> Float[Tensor, "query tile"]:
        """Cosine of each query and each tile, each tile embedded with that query's own A.

        All pairs at once, with gradient; `score.joint_scores` is for many tiles.
        """
        candidate = self.joint(u[None], query.v[:, None])
        return (candidate.float() * query.embedding[:, None].float()).sum(-1)

    def shortlist(self, u: Float[Tensor, "tile hidden"]) -> Float[Tensor, "tile hidden"]:
        """A tile's own embedding (unit norm), under the null synthetic aerial: what FAISS holds.

        Its product with a query of level G is that level's exact score.
        """
        v = self.candidate_query(self.null_synthetic)
        return self.joint(u, v.expand(len(u), -1))

    def save(self, directory: str) -> None:
        """Write `config.json` and `model.safetensors`."""
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, _CONFIG), "w") as file:
            json.dump(self.config.plain(), file, indent=2)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, os.path.join(directory, _WEIGHTS))

    @classmethod
    def load(cls, directory: str, device: torch.device | str = "cpu") -> "JointFeatureLearningNet":
        """The model that `save` wrote, in evaluation mode (VGG's dropout acts in training only).

        Raises:
            ValueError: no model there, or one of another format or preprocessing version.
        """
        model = cls(cls.config_of(directory))
        model.load_state_dict(load_file(os.path.join(directory, _WEIGHTS)))
        return model.to(device).eval()

    @staticmethod
    def config_of(directory: str) -> MatcherConfig:
        """The config of a model directory; raises as `load`."""
        path = os.path.join(directory, _CONFIG)
        if not os.path.isfile(path):
            raise ValueError(
                f"matcher {directory!r}: expected {_CONFIG} and {_WEIGHTS} (a local directory that "
                "jobs/train_matcher.py published), found none."
            )
        with open(path) as file:
            return MatcherConfig.read(json.load(file))

    def _view(self, tile: Tensor, mode: str) -> Tensor:
        if self.config.view == "square":
            return tile
        return geometry.polar(tile, *self.config.polar, mode)


def _standard(feature: Tensor) -> Tensor:
    # Backbones differ by orders of magnitude in scale; without this the nulls (zero, the mean) and
    # the learning rate of the heads would have to be tuned for each.
    return nn.functional.layer_norm(feature.float(), feature.shape[-1:])
