"""Settings of a search: of panorama files, of the rows of a data set."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cvmatch.data.settings import PhotoSettings
from cvmatch.index.settings import Mode
from cvmatch.match.settings import Modality
from cvmatch.runtime.settings import Pool


@dataclass(frozen=True, kw_only=True)
class SearchFiles(PhotoSettings):
    """Find the tiles of panorama files."""

    panorama: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Location of a panorama or photo, or of a directory of them; repeat the flag for more."""
    index: str = "data/index"
    """Directory of the index, local or in an object store (then copied here first)."""
    top_k: int = 10
    """Tiles to return for each panorama."""
    headings: int | None = None
    """Headings that are tried for a panorama of which nothing says where it looks; the best counts.
    None: 32 for photos, and for bands (CVUSA's form) north in the middle. 1: north always."""
    generator: str = ""
    """Directory or URI of a generator, to search with the synthetic aerial too; empty: none."""
    segmenter: str = ""
    """Directory or URI of a segmenter, to search with its class map too; empty: none."""
    num_inference_steps: int | None = None
    """Solver steps of the generator; None: as for the queries of the index."""
    guidance_scale: float | None = None
    """Guidance scale of the generator; None: as for the queries of the index."""
    guidance_interval: float | None = None
    """Guide only while t / T >= this value in [0, 1]; None: as for these queries."""
    mode: Mode = "auto"
    """exact scores every tile, two-stage a shortlist; auto is exact up to 100,000 tiles."""
    shortlist: int = 0
    """Tiles that a two-stage search re-ranks; 0 takes the index's own number."""
    seed: int = 0
    """Seed of the generator's noise."""
    near: tuple[float, float, float] | None = None
    """Only tiles within a circle: latitude, longitude (degrees), metres."""
    box: tuple[float, float, float, float] | None = None
    """Only tiles in a box: south, west, north, east (degrees)."""
    any_models: bool = False
    """Search with another generator or segmenter than the one that made the index's queries."""
    page: str = ""
    """Also write an HTML page of the results there."""
    tiles: str = ""
    """URI of rows (`pair_id`, `aerial`) with pictures of the tiles, for the page; empty: none."""
    open: bool = False
    """Open the page in a browser (without --page: search.html)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.panorama or self.top_k < 1:
            raise ValueError(
                "search: expected at least one panorama (search --panorama FILE, locate FILE) and "
                f"top_k >= 1, got "
                f"{len(self.panorama)} and {self.top_k}."
            )
        if self.segmenter and not self.generator:
            raise ValueError(
                "search: --segmenter segments the synthetic aerial: pass --generator too."
            )
        if self.headings is not None and not 1 <= self.headings <= 360:
            raise ValueError(f"search: expected headings from 1 to 360, got {self.headings}.")
        if self.generator and (self.headings or 1) > 1:
            raise ValueError(
                "search: --generator draws the aerial of a panorama that looks north: pass "
                "--heading, or leave out --headings."
            )
        if self.near and self.box:
            raise ValueError("search: expected --near or --box, got both.")

    @property
    def modality(self) -> Modality:
        """What the queries consist of."""
        if not self.generator:
            return "G"
        return "G+A+S" if self.segmenter else "G+A"


@dataclass(frozen=True, kw_only=True)
class LocatePhotos(SearchFiles):
    """Find the places of photos, for people and maps."""

    panorama: tyro.conf.Positional[tuple[str, ...]] = ()
    """Photos: whole spheres, parts of them, or ordinary ones; or directories of them."""
    geojson: str = ""
    """Also write the tiles as points of GeoJSON there."""
    kml: str = ""
    """Also write them as placemarks of KML there."""
    csv: str = ""
    """Also write them as a table there."""
    basemap: str = ""
    """Address of a background map for the page, with {z}, {x} and {y}, which is then loaded from
    there; empty: none, and the page loads nothing."""
    attribution: str = ""
    """To whom the background map is due, shown on it."""


@dataclass(frozen=True, kw_only=True)
class SearchRows:
    """Find the tiles of many panoramas."""

    rows: str = "data/synthesized/val"
    """URI of the rows (as `cvmatch synthesize` writes)."""
    index: str = "data/index"
    """Directory of the index; a path that all nodes mount, or an object store."""
    output: str = "data/found"
    """URI of the directory of results; the same command goes on where a killed one stopped."""
    modality: Modality = "G+A+S"
    """What a query consists of."""
    top_k: int = 10
    """Tiles to return for each row."""
    mode: Mode = "auto"
    """exact scores every tile, two-stage a shortlist; auto is exact up to 100,000 tiles."""
    embed: Pool = field(default_factory=lambda: Pool(batch=32))
    """Actors that embed queries."""
    rank: Pool = field(default_factory=lambda: Pool(batch=32))
    """Actors that search; each maps the index's files, which they share."""
    retry_rejected: bool = False
    """Make the rows again that failed in an earlier run, also where the output is complete."""
    dry_run: bool = False
    """Say what would be done, where, and what is done already; then stop."""
