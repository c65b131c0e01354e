"""Settings of importing a peer's weights as a matcher, and of publishing a matcher."""

from dataclasses import dataclass

import tyro

SAMPLE4GEO_TOWER = "timm:convnext_base.fb_in22k_ft_in1k_384"
"""Backbone of Sample4Geo's published weights."""

SAMPLE4GEO_DATA = "CVUSA train"
"""What those were trained on whose pictures have the sizes below."""


@dataclass(frozen=True, kw_only=True)
class ImportSample4Geo:
    """Make a matcher of Sample4Geo's published weights (Deuser, Habel and Oswald 2023)."""

    weights: tyro.conf.Positional[str] = ""
    """State dict as Sample4Geo saves it (.pth), such as its weights_e40_98.6830.pth of CVUSA."""
    tower: str = SAMPLE4GEO_TOWER
    """Backbone that was trained, as timm:NAME."""
    panorama: tuple[int, int] = (140, 768)
    """Height and width of G that it was trained with, in pixels."""
    tile_size: int = 384
    """Height and width of C that it was trained with, in pixels."""
    data: str = SAMPLE4GEO_DATA
    """Name of the data set and split that it was trained on, for the model's record."""
    trained_on: str = ""
    """Directory, or URI, of that data set: the ids of its training split are recorded, so that
    cvmatch evaluate refuses these pairs. Empty: it can only warn."""
    output: str = "models/sample4geo"
    """Directory or URI of the matcher."""
