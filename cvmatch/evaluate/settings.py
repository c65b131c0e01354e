"""Settings of the evaluation."""

from dataclasses import dataclass
from typing import Literal

from cvmatch.match.settings import MODALITIES, Modality


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a matcher, its index, and the generator and segmenter behind its queries."""

    queries: str = "data/synthesized/val"
    """URI of synthesized rows that the matcher was not trained on."""
    index: str = "data/index"
    """Local directory of an index that holds the queries' tiles; its model is measured."""
    modalities: tuple[Modality, ...] = MODALITIES
    """What queries consist of."""
    modes: tuple[Literal["exact", "two-stage"], ...] = ("exact", "two-stage")
    """Searches that are timed; two-stage is also compared with the exact answer."""
    fov: tuple[float, ...] = (360.0,)
    """Fields of view in degrees, (0, 360]; below 360 only modality G, whose picture is cut."""
    unknown_heading: bool = False
    """Also turn each panorama by a random angle that the model does not know; modality G alone."""
    headings: int = 1
    """Headings that are tried for views whose heading is not known: of each tile, the best counts.
    1: as if north were in the middle, for a model that was trained so (--unknown-heading)."""
    near_m: float = 1000.0
    """Radius of the near gallery around the true tile, in metres."""
    num_classes: int = 5
    """Classes of the segmenter: 5, or 6 with cars."""
    fid: str = ""
    """Network of the FID of synthetic aerials: inception, or a tower by name or directory; empty:
    not measured."""
    output: str = "data/evaluation"
    """Directory for results.json, queries.parquet and report.html."""
    bootstrap: int = 1000
    """Resamples for each 95 % interval."""
    seed: int = 0
    """Of headings, random galleries and resamples."""

    def __post_init__(self) -> None:
        if self.headings < 1:
            raise ValueError(f"evaluate: expected headings of at least 1, got {self.headings}.")
        if not self.fov or not all(0 < degrees <= 360 for degrees in self.fov):
            raise ValueError(f"evaluate: fov are degrees in (0, 360], got {self.fov}.")
        if "G" not in self.modalities and (self.unknown_heading or self.fov != (360.0,)):
            raise ValueError(
                "evaluate: A and S are made from the whole, aligned panorama, so that limited "
                f"views need modality G: expected G among modalities, got {self.modalities}."
            )
