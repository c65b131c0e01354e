"""Settings of the pairs and photos that a job reads."""

from dataclasses import dataclass, replace
from typing import Literal

from cvmatch.data import storage


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """A split of a data set: CVUSA, its published subset, or pairs of one's own."""

    root: str = "data/world"
    """Directory, or URI, of the data set, or one at most two levels above it."""
    split: Literal["train", "val"] = "train"
    """Which of the two CSVs."""
    cache: str = ""
    """Directory for the checked rows of each split; empty: `.cvmatch` in the data set. Delete it
    when good pictures have changed while the CSVs did not; mended ones are noticed."""
    max_rejected: float = 0.05
    """Largest share of the rows, in [0, 1], that may be unusable; above it the job stops."""
    block: int = 32
    """Rows a block: what one task reads, and what a resumed stream repeats at most."""
    limit: int = 0
    """Rows of the CSV to take, from its top; 0: all."""

    def __post_init__(self) -> None:
        if self.block < 1 or self.limit < 0 or not 0 <= self.max_rejected <= 1:
            raise ValueError(
                "Ingest: expected block >= 1, limit >= 0 and max_rejected in [0, 1], got block "
                f"{self.block}, limit {self.limit}, max_rejected {self.max_rejected}."
            )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The rows that a training is judged by; all else about them is as in its own data."""

    root: str
    """Directory, or URI, of the data set, which may be that of the training rows."""
    split: Literal["train", "val"] = "val"
    """Which of the two CSVs."""
    limit: int = 0
    """Rows of the CSV to take, from its top; 0: all."""

    def ingest(self, data: Ingest) -> Ingest:
        """Return these rows, read as `data` is."""
        return replace(data, root=self.root, split=self.split, limit=self.limit)


@dataclass(frozen=True, kw_only=True)
class PhotoSettings:
    """What is known of photos beside what they say themselves."""

    heading: float | None = None
    """Where the middle of each picture looks, in degrees clockwise from north; None: as its XMP or
    EXIF says, else north."""
    fov: float | None = None
    """Degrees from left to right that a picture shows which is no panorama of a whole turn; None:
    as its EXIF says."""
    max_pixels: int = 2**27
    """Largest picture that is read, in pixels (128 Mi: a sphere of 16384 x 8192)."""

    def __post_init__(self) -> None:
        if self.heading is not None and not -360 <= self.heading <= 360:
            raise ValueError(f"heading: expected degrees in [-360, 360], got {self.heading}.")
        if self.fov is not None and not 0 < self.fov <= 360:
            raise ValueError(f"fov: expected degrees in (0, 360], got {self.fov}.")
        if not 0 < self.max_pixels <= 170 * 2**20:
            raise ValueError(
                f"max-pixels: expected 1 to {170 * 2**20} (what Pillow opens), got "
                f"{self.max_pixels}."
            )


def check_disjoint(data: Ingest, val: Validation | None) -> None:
    """Check that a training is not judged by its own rows.

    Raises:
        ValueError: both are the same split of the same root.
    """
    if val and (storage.absolute(data.root), data.split) == (storage.absolute(val.root), val.split):
        raise ValueError(
            f"validation: expected other rows than in training, got the split {val.split!r} of "
            f"{val.root} for both. Pass another one with --val.root and --val.split."
        )
