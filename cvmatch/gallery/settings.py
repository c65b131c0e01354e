"""Settings of the job that cuts imagery into the cells of a gallery."""

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
