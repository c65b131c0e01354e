"""Matcher: pictures of a query (G, A, S) and of tiles (C) -> what scores need.

The towers are here; what joins their features, and how a pair is scored, is in `fusion.py`.
"""

import dataclasses
import json
import os

import torch
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvmatch.data import geometry, images, manifest
from cvmatch.data.schema import PALETTE
from cvmatch.match.fusion import ALONE, Fusion, Query
from cvmatch.match.settings import View
from cvmatch.nn.backbones import Tower, TowerSpec, normalise

_TOWERS = ("ground", "aerial", "classes")
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_FORMAT = 3  # 1 had heads without a skip, 2 other names of layers
_TILE = ("aerial_tower.", "tile_linear.")
_TAIL = ("candidate_mlp.",)
_TILE_CONFIG = ("aerial", "view", "polar", "square", "preprocess", "format")


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
    """Width of the fusion layers, of the embeddings, and of `tile_proj` (2 bytes a number)."""
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


class Matcher(Fusion):
    """Towers for G, S and (one for both) A and C, in front of the fusion heads.

    Where the config says so, one tower is shared by G, A and C, or there is none for S.
    """

    def __init__(
        self, config: MatcherConfig, towers: tuple[Tower, Tower, Tower] | None = None
    ) -> None:
        """`towers` for G, for A and C, and for S; untrained ones of `config` by default."""
        ground, aerial, classes = towers or _towers(config)
        super().__init__(
            aerial.dim if config.shared else ground.dim,
            aerial.dim,
            0 if config.alone else classes.dim,
            config.hidden,
        )
        self.config = config
        self.aerial_tower = aerial
        self.ground_tower = None if config.shared else ground
        self.classes_tower = None if config.alone else classes
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
            raise ValueError(ALONE)
        colours = self.palette[ids.int()].permute(0, 3, 1, 2)
        return _standard(self.classes_tower(normalise(self._view(colours, "nearest"))))

    def tile(self, aerial: Float[Tensor, "tile 3 s s"]) -> Float[Tensor, "tile hidden"]:
        """`tile_proj` = W1c c of tiles: all that is stored of them."""
        return self.tile_linear(self.aerial_features(aerial))

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

    def save(self, directory: str) -> None:
        """Write `config.json` and `model.safetensors`."""
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, _CONFIG), "w") as file:
            json.dump(self.config.plain(), file, indent=2)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, os.path.join(directory, _WEIGHTS))

    @classmethod
    def load(cls, directory: str, device: torch.device | str = "cpu") -> "Matcher":
        """The model that `save` wrote, in evaluation mode (VGG's dropout acts in training only).

        Raises:
            ValueError: no model there, or one of another format or preprocessing version.
        """
        config = cls.config_of(directory)
        with torch.device("meta"):  # random values of three VGG16 would take 5.5 s
            towers = _towers(config)
        model = cls(config, towers)
        model.load_state_dict(load_file(os.path.join(directory, _WEIGHTS)), assign=True)
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
        return geometry.to_polar(tile, *self.config.polar, mode)


def load_fusion(directory: str, device: torch.device | str = "cpu") -> Fusion:
    """What scores need of the model that `Matcher.save` wrote, in evaluation mode.

    Its towers are not read: with three VGG16, that leaves 22 MB of 1.6 GB.

    Raises:
        ValueError: see `Matcher.load`.
    """
    config = Matcher.config_of(directory)
    with safe_open(os.path.join(directory, _WEIGHTS), "pt") as file:
        names = [name for name in file.keys() if "_tower." not in name]  # noqa: SIM118 (no dict)
        state = {name: file.get_tensor(name) for name in names}
    ground, aerial, classes = (
        len(state[name]) for name in ("null_ground", "null_synthetic", "null_classes")
    )
    model = Fusion(ground, aerial, classes, config.hidden)
    model.load_state_dict(state)
    return model.to(device).eval()


def fingerprint_parts(directory: str) -> dict[str, str]:
    """Hash (SHA-256, hex) each part of a saved matcher, so that a change redoes only what it must.

    `tile`: what makes `tile_proj` of a tile, the tower of tiles and W1c. `tail`: what follows
    FFN_C's first layer, so scores and the shortlist. `query`: everything else.

    Raises:
        ValueError: see `Matcher.load`.
    """
    config = Matcher.config_of(directory).plain()
    lines: dict[str, list] = {
        "tile": [[config[name] for name in _TILE_CONFIG]],
        "tail": [],
        "query": [config],
    }
    for name, line in sorted(manifest.tensors(directory).items()):
        lines[_part_of(name)].append(line)
    return {part: manifest.digest(values) for part, values in lines.items()}


def _part_of(name: str) -> str:
    if name.startswith(_TILE):
        return "tile"
    return "tail" if name.startswith(_TAIL) else "query"


def _towers(config: MatcherConfig) -> tuple[Tower, Tower, Tower]:
    return Tower(config.ground), Tower(config.aerial), Tower(config.classes)


def _standard(feature: Tensor) -> Tensor:
    # Backbones differ by orders of magnitude in scale; without this the nulls (zero, the mean) and
    # the learning rate of the heads would have to be tuned for each.
    return nn.functional.layer_norm(feature.float(), feature.shape[-1:])
