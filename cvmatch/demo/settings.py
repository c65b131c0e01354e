"""Settings of the demo and of its embedded data set."""

from dataclasses import dataclass, field
from typing import Literal

Preset = Literal["tiny", "demo"]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole pipeline on an embedded data set of procedural places."""

    output: str = "demo"
    """Local directory of everything that the demo makes."""
    preset: Preset = "demo"
    """demo: 960 + 320 pairs, minutes. tiny: 24 + 12 pairs, to see that everything runs."""
    workers: int = 0
    """Ray Train workers (DDP) of the matcher's training; 0: it trains in this process. Two workers
    share its steps, but on two cores save less than their start takes (35 s)."""
    seed: int = 0
    """Seed of worlds, weights and noise."""


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What makes matching harder."""

    heading_noise: float = 0.0
    """Standard deviation of the panorama's heading error, in degrees."""
    camera_offset: float = 0.0
    """Standard deviation of the camera's offset from the tile's centre, each way, in metres."""


@dataclass(frozen=True, kw_only=True)
class MakeWorld:
    """Write an embedded CVUSA: `cvmatch demo-data --output data/demo`."""

    output: str = "data/world"
    """Directory, or a URI that cvmatch.data.storage opens; all nodes must reach it."""
    preset: Literal["tiny", "demo", "standard", "large"] = "demo"
    """Sizes and counts of train + val pairs: tiny 24 + 12, demo 960 + 320, standard 2,000 + 500,
    and large 20,000 + 2,000 in CVUSA's own sizes."""
    layout: Literal["subset", "official"] = "subset"
    """CVUSA_subset with class maps, or CVPR_subset (with the class maps added)."""
    train: int | None = None
    """Training pairs, rounded up to whole worlds; None takes the preset's."""
    val: int | None = None
    """Held-out pairs, rounded up to whole worlds; None takes the preset's."""
    difficulty: Difficulty = field(default_factory=Difficulty)
    """What makes matching harder."""
    near_gallery: bool = False
    """Held-out pairs come from a quarter of the worlds, so tiles that overlap compete."""
    polar: bool = False
    """Also write the polar views, 128 x 512."""
    seed: int = 0
    """Data sets of different seeds share no world. Those of one seed share worlds, in other splits
    where `train` differs: measure a model on the data set that it was trained on."""
