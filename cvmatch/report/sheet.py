"""What the pipeline made of a place; as one picture, and as pictures inside a page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cvmatch.data import images

Pixels = UInt8[np.ndarray, "_ _ 3"]

_RIGHT, _WRONG = (22, 150, 72), (205, 205, 205)  # frames of tiles in the contact sheet, RGB
_GAP = 3  # pixels around a cell of the contact sheet
_SMALL = 128 * 128  # pictures of at most this many pixels stay lossless in a page


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A tile that a search answered with."""

    pair_id: str
    """Whose tile it is."""
    picture: Pixels | None
    """The tile, RGB; None where it is not at hand."""
    score: float | int
    """Higher is better."""
    place: tuple[float, float] | None = None
    """Degrees north and east; None where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the pipeline made of one panorama."""

    pair_id: str
    """The place."""
    ground: Pixels
    """G, the panorama."""
    synthetic: Pixels | None = None
    """A, the generated tile; None where the generator did not run."""
    classes: UInt8[np.ndarray, "_ _"] | None = None
    """S, the map of class ids of A; None where the segmenter did not run."""
    aerial: Pixels | None = None
    """C, the tile that is right; None where that is not known."""
    top: Sequence[Tile]
    """The best tiles, best first."""
    rank: int | None = None
    """Place of the right tile in the whole gallery, from 1; None where it was not looked up."""
    note: str = ""
    """Why it is shown."""
    positions: Sequence[tuple[float, float]] = ()
    """Metres east and north of the best tiles from the first one, for a map; empty: no map."""

    @property
    def class_colours(self) -> Pixels | None:
        """S in the colours of the palette."""
        return None if self.classes is None else images.colours_of(self.classes)


def retrieval_sheet(examples: Sequence[Example], side: int = 96) -> Pixels:
    """One picture with a row for each example: G | A | S | C | the best tiles, the right one green.

    `side` is that of a tile, in pixels; a panorama gets a cell four times as wide. A stage that did
    not run leaves its cell white.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("retrieval_sheet: expected at least one example, got none.")
    most = max(len(example.top) for example in examples)
    rows = []
    for example in examples:
        made = (example.synthetic, example.class_colours, example.aerial)
        cells = [_cell(example.ground, (side, 4 * side))]
        cells += [_cell(picture, (side, side)) for picture in made]
        for tile in example.top:
            frame = _RIGHT if tile.pair_id == example.pair_id else _WRONG
            cells.append(_cell(tile.picture, (side, side), frame))
        cells += [_cell(None, (side, side))] * (most - len(example.top))
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows)


def data_uri(pixels: Pixels, widest: int, classes: bool = False) -> str:
    """A picture of at most `widest` pixels across as a data URI; class maps keep exact colours."""
    height, width = pixels.shape[:2]
    if width > widest:
        method = Image.Resampling.NEAREST if classes else Image.Resampling.LANCZOS
        pixels = _resized(pixels, (max(1, round(height * widest / width)), widest), method)
    kind = "PNG" if classes or pixels.shape[0] * pixels.shape[1] <= _SMALL else "JPEG"
    text = base64.b64encode(images.encode(pixels, kind)).decode()
    return f"data:image/{kind.lower()};base64,{text}"


def _cell(
    picture: Pixels | None, size: tuple[int, int], frame: tuple[int, int, int] | None = None
) -> Pixels:
    """`picture` fitted into `size` = (height, width) on white, with a gap or a frame around it."""
    height, width = size
    cell = np.full((height + 2 * _GAP, width + 2 * _GAP, 3), frame or 255, dtype=np.uint8)
    cell[_GAP:-_GAP, _GAP:-_GAP] = 255
    if picture is not None:
        scale = min(height / picture.shape[0], width / picture.shape[1])
        fitted = (max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale)))
        top, left = _GAP + (height - fitted[0]) // 2, _GAP + (width - fitted[1]) // 2
        small = _resized(picture, fitted, Image.Resampling.BICUBIC)
        cell[top : top + fitted[0], left : left + fitted[1]] = small
    return cell


def _resized(pixels: Pixels, size: tuple[int, int], method: Image.Resampling) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), method))
