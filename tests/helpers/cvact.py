"""A tiny CVACT."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import io as matlab

from tests.helpers.cvusa import put
from tests.helpers.own_pairs import pad_to_sphere
from tests.helpers.photo import save

UTM = (693_400.0, 6_090_800.0)
"""Of Canberra."""


def write_list(
    root: Path, ids: Sequence[str], train: Sequence[int], val: Sequence[int], **changes: Any
) -> None:
    """The file of MATLAB's; numbers count from 1. `changes`: None takes a variable away."""
    data: dict[str, Any] = {
        "panoIds": np.array(ids),
        "utm": np.array([[UTM[0] + 40 * n, UTM[1] - 30 * n] for n in range(len(ids))]),
        "trainSet": {"trainInd": np.array([*train])[:, None]},
        "valSet": {"valInd": np.array([*val])[:, None]},
    }
    data = {name: value for name, value in (data | changes).items() if value is not None}
    file = io.BytesIO()
    matlab.savemat(file, data)
    put(root / "ACT_data.mat", file.getvalue())


def write_pictures(root: Path, pair_id: str, band: np.ndarray, tile: bytes) -> None:
    """A pair's pictures: the band (64 x 352) as a whole sphere, and the tile."""
    folder = root / "ANU_data_small"
    put(folder / f"streetview/{pair_id}_grdView.jpg", save(pad_to_sphere(band), "JPEG", quality=95))
    put(folder / f"satview_polish/{pair_id}_satView_polish.jpg", tile)
