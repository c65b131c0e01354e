"""Settings of the jobs that cut imagery: into the cells of a gallery, and into tiles of photos."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["auto", "xyz", "tms", "mbtiles", "pmtiles", "raster"]
"""How imagery is stored; raster: whatever GDAL opens, such as GeoTIFF, COG or VRT."""


@dataclass(frozen=True, kw_only=True)
class MakeGallery:
    """Cut imagery into square cells of the ground, as rows for an index."""

    imagery: str = "data/imagery"
    """Location of a folder of map tiles ({z}/{x}/{y}.png, .jpg or .webp), or of a file: MBTiles,
    PMTiles, GeoTIFF, COG or VRT. A local one must be there on all nodes; MBTiles and GeoTIFF in an
    object store are copied to each node once."""
    format: Format = "auto"
    """How it is stored; auto: by what is there. tms: map tiles whose rows count from the south."""
    region: str = ""
    """GeoJSON file (Polygon, MultiPolygon or features of these): cells whose middle lies in it are
    cut. Empty: all of the imagery."""
    metres: float = 60.0
    """Width and height of a cell on the ground, in metres."""
    overlap: float = 0.5
    """Share of a cell, in [0, 1), that the next one shows too."""
    size: int = 256
    """Width and height of a cell's picture, in pixels."""
    zoom: int | None = None
    """Zoom level that is read; None: for each cell the coarsest level that is as fine as its
    picture, or the finest there is."""
    min_coverage: float = 0.5
    """Least share of a cell, in [0, 1], that the imagery must show; the rest of it is black."""
    encoding: Literal["png", "jpeg"] = "png"
    """Of the pictures; png is lossless."""
    vintage: str = ""
    """When the imagery was taken, such as 2025-06: text for the column `vintage`; empty: none."""
    output: str = "data/tiles"
    """URI of the directory of rows; the same command goes on where a killed one stopped."""
    max_rejected: float = 0.05
    """Largest share of the cells, in [0, 1], whose imagery cannot be read."""
    retry_rejected: bool = False
    """Cut the cells again that failed in an earlier run, also where the output is complete."""

    def __post_init__(self) -> None:
        if not (self.metres > 0 and 0 <= self.overlap < 1 and self.size >= 1):
            raise ValueError(
                "gallery: expected metres > 0, overlap in [0, 1) and size >= 1, got metres "
                f"{self.metres}, overlap {self.overlap}, size {self.size}."
            )
        if not (0 <= self.min_coverage <= 1 and 0 <= self.max_rejected <= 1):
            raise ValueError(
                "gallery: expected min_coverage and max_rejected in [0, 1], got min_coverage "
                f"{self.min_coverage}, max_rejected {self.max_rejected}."
            )


@dataclass(frozen=True, kw_only=True)
class MakePairs:
    """Cut the tile of each photo's place out of imagery, as pairs to learn from."""

    photos: str = "data/photos"
    """Directory or URI of panoramas (docs/photos.md), which may lie in folders below."""
    positions: str = ""
    """CSV with the columns photo (a file below `photos`), latitude, longitude and, where known,
    heading, in degrees. Empty: all photos, where their EXIF says that they were taken."""
    imagery: str = "data/imagery"
    """Location of imagery, as `cvmatch gallery` takes it."""
    format: Format = "auto"
    """How it is stored; auto: by what is there. tms: map tiles whose rows count from the south."""
    metres: float = 60.0
    """Width and height of a tile on the ground, in metres: those of the gallery's cells."""
    size: int = 256
    """Width and height of a tile's picture, in pixels."""
    zoom: int | None = None
    """Zoom level that is read; None: the coarsest that is as fine as the picture, or the finest."""
    min_coverage: float = 0.9
    """Least share of a tile, in [0, 1], that the imagery must show; the rest of it is black."""
    val_share: float = 0.2
    """Share of the ground, in [0, 1), whose pairs are held out as the split val."""
    block_metres: float = 500.0
    """Width of the squares of the ground that are of one split whole. Pairs whose tile reaches into
    a square of the other split are left out."""
    max_rejected: float = 0.05
    """Largest share of the photos, in [0, 1], that cannot be read or have no place."""
    output: str = "data/pairs"
    """Directory or URI of the pairs (docs/own-data.md); the same command goes on where a killed one
    stopped."""
    seed: int = 0
    """Of the choice of squares."""

    def __post_init__(self) -> None:
        if not (self.metres > 0 and self.size >= 1 and self.block_metres >= self.metres):
            raise ValueError(
                "pairs: expected metres > 0, size >= 1 and block_metres >= metres, got metres "
                f"{self.metres}, size {self.size}, block_metres {self.block_metres}."
            )
        shares = (self.min_coverage, self.max_rejected)
        if not all(0 <= share <= 1 for share in shares) or not 0 <= self.val_share < 1:
            raise ValueError(
                "pairs: expected min_coverage and max_rejected in [0, 1] and val_share in [0, 1), "
                f"got {self.min_coverage}, {self.max_rejected} and {self.val_share}."
            )
