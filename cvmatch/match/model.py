"""The matcher: pictures of a query (G, A, S) and of tiles (C) -> their vectors.

The towers are here. What makes vectors of their features, and scores them, is in `heads/` and
`joint.py`.
"""

import dataclasses
import json
import os
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvmatch.data import images, manifest, storage
from cvmatch.data.schema import PALETTE
from cvmatch.match.heads.branches import (
    GROUND_ONLY,
    BranchHeads,
    Features,
    FusionWeights,
    SumScorer,
    branch_widths,
    embed_layout,
)
from cvmatch.match.heads.joint import JointHeads, JointScorer
from cvmatch.match.settings import Head, MatcherShape
from cvmatch.nn import geometry
from cvmatch.nn.backbones import Tower, TowerSpec

_TOWERS = ("ground", "aerial", "mask")
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_FORMAT = 4  # 1 had heads without a skip; 2 other names; 3 joint scores alone

Scorer = SumScorer | JointScorer
"""Scores of tiles for queries, by their vectors. The product of the first `shortlist_width` numbers
is the score, or comes near it."""

_HEADS = "heads."
_TILE = (
    "aerial_tower.",
    "heads.tile.",
    "heads.tile_linear.",
    "heads.candidate_mlp.",
    "heads.query_aerial_linear.",
    "heads.null_synthetic",
)
_TILE_CONFIG = ("score", "branches", "hidden", "aerial", "projection", "panorama", "tile_size")
_TILE_CONFIG += ("preprocess", "format")  # and `head`, which shows in the names of the tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatcherConfig(MatcherShape):
    """Shape and towers of a matcher; its JSON is the `config.json` of a model directory."""

    ground: TowerSpec = dataclasses.field(default_factory=TowerSpec)
    """Tower of G; not used where one is `shared`."""
    aerial: TowerSpec = dataclasses.field(default_factory=TowerSpec)
    """Tower of both A and C; of G too where it is `shared`."""
    mask: TowerSpec = dataclasses.field(default_factory=TowerSpec)
    """Tower of S, which sees the class map in the palette's colours; only of a joint score."""
    head: Head = "residual"
    """What makes an embedding of a tower's features. none: nothing, they are scaled to unit norm,
    as Sample4Geo's are; `hidden` is the tower's width then, and the branch is direct alone."""
    preprocess: str = images.PREPROCESS
    """Version of decoding and resizing that the weights were trained with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "none" and (self.score, self.branches) != ("sum", ("direct",)):
            raise ValueError(
                "matcher: expected the branch direct alone where there are no heads, got score "
                f"{self.score!r} and branches {self.branches}."
            )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        if self.head == "residual":  # unnamed, so that the fingerprints of such models stay
            del fields["head"]
        towers = {name: getattr(self, name).to_json() for name in _TOWERS}
        return fields | towers | {"format": _FORMAT}

    @property
    def parts(self) -> dict[str, int]:
        """Names and widths of the parts of a tile's vector."""
        if self.score == "joint":
            return {"embedding": self.hidden, "tile_proj": self.hidden}
        return dict(branch_widths(self.branches, self.hidden))

    @property
    def width(self) -> int:
        """Numbers of a tile's vector, and of a query's."""
        return sum(self.parts.values())

    @property
    def shortlist_width(self) -> int:
        """Numbers of its first part, whose product with a query's is the score or comes near it."""
        return self.hidden if self.score == "joint" else self.width

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "MatcherConfig":
        """Read the config of a model directory.

        Raises:
            ValueError: the weights are of another format, or were trained with another version of
                decoding and resizing.
        """
        fields = dict(fields)
        if (version := fields.pop("format", 1)) != _FORMAT:
            raise ValueError(
                f"matcher: {_CONFIG} has format {version}, this version reads {_FORMAT}. "
                "Train it again, or use the older version."
            )
        for name in _TOWERS:
            fields[name] = TowerSpec.from_json(fields[name])
        for name in ("panorama", "branches"):
            fields[name] = tuple(fields[name])
        config = cls(**fields)
        if config.preprocess not in images.PREPROCESSINGS:
            raise ValueError(
                f"matcher: trained with pictures prepared by {config.preprocess!r}, but this "
                f"version prepares them by one of {images.PREPROCESSINGS}. "
                "Train it again, or use the older version."
            )
        return config


class Matcher(nn.Module):
    """Towers for G, S and (one for both) A and C, in front of the heads.

    Where the config says so, one tower is shared by G, A and C. S has one for a joint score alone.
    """

    def __init__(
        self, config: MatcherConfig, towers: tuple[Tower, Tower, Tower] | None = None
    ) -> None:
        """`towers` for G, for A and C, and for S; untrained ones of `config` by default."""
        super().__init__()
        ground, aerial, mask = towers or _build_towers(config)
        self.config = config
        self.aerial_tower = aerial
        self.ground_tower = None if config.shared else ground
        self.mask_tower = mask if config.score == "joint" else None
        ground_dim = aerial.dim if config.shared else ground.dim
        self.heads: JointHeads | BranchHeads
        if config.score == "joint":
            self.heads = JointHeads(ground_dim, aerial.dim, mask.dim, config.hidden)
        else:
            self.heads = BranchHeads(
                config.branches, ground_dim, aerial.dim, config.hidden, config.head
            )
        self.palette: Tensor
        palette = torch.zeros(256, 3)  # ignored pixels stay black
        palette[: len(PALETTE)] = torch.tensor(PALETTE) / 255
        self.register_buffer("palette", palette, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.aerial_tower.parameters()).device

    @property
    def ground_mean(self) -> tuple[float, float, float]:
        """Colour (R, G, B in [0, 1]) that the tower of G sees as zero."""
        return (self.ground_tower or self.aerial_tower).spec.mean

    def ground_features(self, ground: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n g"]:
        """Return g of panoramas in [0, 1]."""
        return self._features(self.ground_tower or self.aerial_tower, ground)

    def aerial_features(self, tile: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n a"]:
        """Return a or c of tiles in [0, 1]."""
        return self._features(self.aerial_tower, self._project(tile, "bilinear"))

    def mask_features(self, ids: UInt8[Tensor, "n s s"]) -> Float[Tensor, "n c"]:
        """Return s of maps of class ids, seen in the palette's colours.

        Raises:
            ValueError: the model does not look at S.
        """
        if self.mask_tower is None:
            raise ValueError("matcher: S is looked at by a joint score alone. Leave it out.")
        colours = self.palette[ids.int()].permute(0, 3, 1, 2)
        return self._features(self.mask_tower, self._project(colours, "nearest"))

    def tile_features(self, aerial: Float[Tensor, "tile 3 s s"]) -> Features:
        """Return what the heads see of tiles in [0, 1]."""
        return Features(aerial=self.aerial_features(aerial), layout=self._layout(aerial))

    def query_features(
        self,
        ground: Float[Tensor, "query 3 h w"] | None = None,
        synthetic: Float[Tensor, "query 3 s s"] | None = None,
        synthetic_mask: UInt8[Tensor, "query s s"] | None = None,
    ) -> Features:
        """Return what the heads see of whatever there is of G, A (both in [0, 1]) and S (ids).

        Raises:
            ValueError: there is an A, which the model cannot use.
        """
        if synthetic is not None and self.config.ground_only:
            raise ValueError(GROUND_ONLY)
        if self.mask_tower is None:
            synthetic_mask = None
        tower = "A" in self.config.tower_letters
        return Features(
            None if ground is None else self.ground_features(ground),
            None if synthetic is None or not tower else self.aerial_features(synthetic),
            None if synthetic_mask is None else self.mask_features(synthetic_mask),
            None if synthetic is None else self._layout(synthetic),
        )

    def embed_tiles(self, aerial: Float[Tensor, "tile 3 s s"]) -> Float[Tensor, "tile width"]:
        """Return the vectors of tiles in [0, 1]: all that is stored of them."""
        return self.heads.embed_tiles(self.tile_features(aerial))

    def embed_queries(
        self,
        ground: Float[Tensor, "query 3 h w"] | None = None,
        synthetic: Float[Tensor, "query 3 s s"] | None = None,
        synthetic_mask: UInt8[Tensor, "query s s"] | None = None,
    ) -> Float[Tensor, "query width"]:
        """Return the vectors of queries of whatever there is of G, A (both in [0, 1]) and S (ids).

        Raises:
            ValueError: the model cannot use what there is.
        """
        return self.heads.embed_queries(self.query_features(ground, synthetic, synthetic_mask))

    def save(self, directory: str) -> None:
        """Write `config.json`, `model.safetensors` and, of a sum, `fusion.json`."""
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, _CONFIG), "w") as file:
            json.dump(self.config.to_json(), file, indent=2)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, os.path.join(directory, _WEIGHTS))
        if isinstance(self.heads, BranchHeads):
            self.heads.weights.save(directory)

    @classmethod
    def load(cls, directory: str, device: torch.device | str = "cpu") -> "Matcher":
        """Load the model that `save` wrote, in evaluation mode (VGG's dropout acts in training).

        Raises:
            ValueError: no model there, or one of another format or preprocessing version.
        """
        directory = storage.local_directory(directory)
        config = read_config(directory)
        with torch.device("meta"):  # random values of three VGG16 would take 5.5 s
            towers = _build_towers(config)
        model = cls(config, towers)
        model.load_state_dict(load_file(os.path.join(directory, _WEIGHTS)), assign=True)
        if isinstance(model.heads, BranchHeads):
            model.heads.weights = FusionWeights.load(directory)
        return model.to(device).eval()

    def _features(self, tower: Tower, image: Tensor) -> Tensor:
        feature = tower(tower.normalise(image)).float()
        if self.config.head == "none":
            return feature
        # Backbones differ by orders of magnitude in scale; without this the nulls (zero, the mean)
        # and the learning rate of the heads would have to be tuned for each.
        return nn.functional.layer_norm(feature, feature.shape[-1:])

    def _layout(self, tile: Tensor) -> Tensor | None:
        return embed_layout(tile) if "layout" in self.config.parts else None

    def _project(self, tile: Tensor, mode: str) -> Tensor:
        if self.config.projection == "square":
            return tile
        return geometry.to_polar(tile, *self.config.panorama, mode)


def read_config(directory: str) -> MatcherConfig:
    """Read the config of a model directory.

    Raises:
        ValueError: no model there, or one of another format or preprocessing version.
    """
    local = storage.local_directory(directory)
    path = os.path.join(local, _CONFIG)
    if not os.path.isfile(path):
        raise ValueError(
            f"matcher {storage.describe_local(directory)}: expected {_CONFIG} and {_WEIGHTS} (a "
            "directory that cvmatch train-matcher published), found none. Of a cluster, each node "
            "has to see it: pass a directory that all mount, or a URI (s3://...)."
        )
    with open(path) as file:
        return MatcherConfig.from_json(json.load(file))


def load_scorer(directory: str, device: torch.device | str = "cpu") -> Scorer:
    """Load what scores the vectors of the model that `Matcher.save` wrote.

    Its towers are not read: with three VGG16, that leaves at most 22 MB of 1.6 GB.

    Raises:
        ValueError: see `Matcher.load`.
    """
    directory = storage.local_directory(directory)
    config = read_config(directory)
    if config.score == "sum":
        return SumScorer(config.parts, device)
    with safe_open(os.path.join(directory, _WEIGHTS), "pt") as file:
        names = [name for name in file.keys() if name.startswith(_HEADS)]  # noqa: SIM118 (no dict)
        state = {name.removeprefix(_HEADS): file.get_tensor(name) for name in names}
    ground, aerial, mask = (
        len(state[name]) for name in ("null_ground", "null_synthetic", "null_mask")
    )
    heads = JointHeads(ground, aerial, mask, config.hidden)
    heads.load_state_dict(state)
    return JointScorer(heads.to(device).eval())


def fingerprint_parts(directory: str) -> dict[str, str]:
    """Hash (SHA-256, hex) each part of a saved matcher, so that a change redoes only what it must.

    `tile`: what makes the vector of a tile. `query`: everything else.

    Raises:
        ValueError: see `Matcher.load`.
    """
    directory = storage.local_directory(directory)
    config = read_config(directory).to_json()
    lines: dict[str, list] = {
        "tile": [[config[name] for name in _TILE_CONFIG]],
        "query": [config],
    }
    for name, line in sorted(manifest.tensors(directory).items()):
        lines["tile" if name.startswith(_TILE) else "query"].append(line)
    if config["score"] == "sum":
        lines["query"].append(dataclasses.asdict(FusionWeights.load(directory)))
    return {part: manifest.digest(values) for part, values in lines.items()}


def _build_towers(config: MatcherConfig) -> tuple[Tower, Tower, Tower]:
    if config.shared and config.score == "sum":  # timm's would take a second each
        tower = Tower(config.aerial)
        return tower, tower, tower
    return Tower(config.ground), Tower(config.aerial), Tower(config.mask)
