"""Examples -> one picture with a row for each."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cvmatch.report.examples import Example, Pixels

_RIGHT, _WRONG = (22, 150, 72), (205, 205, 205)  # frames of tiles, RGB
_GAP = 3  # pixels around a cell


def make_image_grid(examples: Sequence[Example], side: int = 96) -> Pixels:
    """Return a picture with a row for each example: G | A | S | C | the best tiles.

    The right tile has a green frame. A stage that did not run leaves its cell white.

    Args:
        examples: at least one.
        side: of a tile, in pixels; a panorama gets a cell four times as wide.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("make_image_grid: expected at least one example, got none.")
    most = max(len(example.top) for example in examples)
    rows = []
    for example in examples:
        pictures = (example.synthetic, example.class_colors, example.aerial)
        cells = [_make_cell(example.ground, (side, 4 * side))]
        cells += [_make_cell(picture, (side, side)) for picture in pictures]
        for tile in example.top:
            frame = _RIGHT if tile.pair_id == example.pair_id else _WRONG
            cells.append(_make_cell(tile.picture, (side, side), frame))
        cells += [_make_cell(None, (side, side))] * (most - len(example.top))
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows)


def resize(pixels: Pixels, size: tuple[int, int], method: Image.Resampling) -> Pixels:
    """Resize a picture to (height, width)."""
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), method))


def _make_cell(
    picture: Pixels | None, size: tuple[int, int], frame: tuple[int, int, int] | None = None
) -> Pixels:
    """Fit a picture into `size` = (height, width) on white, with a gap or a frame around it."""
    height, width = size
    cell = np.full((height + 2 * _GAP, width + 2 * _GAP, 3), frame or 255, dtype=np.uint8)
    cell[_GAP:-_GAP, _GAP:-_GAP] = 255
    if picture is not None:
        scale = min(height / picture.shape[0], width / picture.shape[1])
        fitted = (max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale)))
        top, left = _GAP + (height - fitted[0]) // 2, _GAP + (width - fitted[1]) // 2
        small = resize(picture, fitted, Image.Resampling.BICUBIC)
        cell[top : top + fitted[0], left : left + fitted[1]] = small
    return cell
