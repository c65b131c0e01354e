"""CVACT (Liu and Li 2019) as it is handed out: one file of MATLAB's, and folders of pictures.

    ACT_data.mat                                           panoIds, utm, trainSet.trainInd and
                                                           valSet.valInd (which count from 1)
    ANU_data_small/streetview/<id>_grdView.jpg             whole spheres, north in the middle
    ANU_data_small/satview_polish/<id>_satView_polish.jpg

The field takes the middle half of a sphere's height (SAFA). Here it is a photo like any other, of
which the band of CVUSA's panoramas is cut, so that one model can learn from both and be tried on
either. Of some ids the pictures are not handed out: they are rejected rows. The larger test set
(`ANU_data_test`), where all tiles within 25 m are right, is not read.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cvmatch.data import storage
from cvmatch.data.geography import utm_to_degrees
from cvmatch.data.layouts.rows import Row, check_once

TABLE = "ACT_data.mat"

ZONE = 55
"""Of UTM, in its southern half: Canberra's."""

_SETS = {"train": ("trainSet", "trainInd"), "val": ("valSet", "valInd")}
_PICTURES = "ANU_data_small"


@dataclass(frozen=True, kw_only=True)
class CVACT:
    """A directory of CVACT (a `Layout`)."""

    root: str
    table: str
    """Location of the file that lists all pairs."""
    photos: bool = True

    @property
    def tables(self) -> dict[str, str]:
        """The one file, for both splits."""
        return dict.fromkeys(_SETS, self.table)

    @property
    def sources(self) -> Sequence[str]:
        """The file."""
        return (self.table,)

    def name_table(self, split: str) -> str:
        """Return the name of the file."""
        return TABLE

    def read_rows(self, split: str) -> list[Row]:
        """Read the pairs of a split."""
        return read_rows(self.table, split)


def find_at(root: str) -> CVACT | None:
    """Return the data set whose file lies in `root`; None where there is none."""
    for name in storage.names(root):
        if name.lower() == TABLE.lower():
            return CVACT(root=root, table=storage.join(root, name))
    return None


def read_rows(table: str, split: str) -> list[Row]:
    """Read the pairs of a split, with the positions that UTM says.

    Raises:
        ValueError: no such file of MATLAB's, a number that is no pair's, no pairs, or one twice.
    """
    data = _load(table)
    names = [str(name).strip() for name in np.atleast_1d(data["panoIds"])]
    places = np.asarray(data["utm"], dtype=np.float64).reshape(-1, 2)
    outer, inner = _SETS[split]
    numbers = np.atleast_1d(np.asarray(data[outer][inner])).ravel().astype(np.int64)
    wrong = numbers[(numbers < 1) | (numbers > len(names))]
    if len(places) != len(names) or len(wrong):
        raise ValueError(
            f"{table}: expected as many rows of utm as panoIds, and {outer}.{inner} from 1 to this "
            f"number, got {len(names)} panoIds, {len(places)} rows of utm and the numbers "
            f"{wrong[:3].tolist()}. Download it again."
        )
    latitude, longitude = utm_to_degrees(places[:, 0], places[:, 1], ZONE, south=True)
    rows = [
        (
            place,
            Row(
                pair_id=names[number - 1],
                aerial=f"{_PICTURES}/satview_polish/{names[number - 1]}_satView_polish.jpg",
                ground=f"{_PICTURES}/streetview/{names[number - 1]}_grdView.jpg",
                position=(latitude[number - 1].item(), longitude[number - 1].item()),
                heading=0.0,
            ),
        )
        for place, number in enumerate(numbers.tolist(), 1)
    ]
    return check_once(f"{table} ({outer})", rows)


def _load(table: str) -> Mapping[str, Any]:
    from scipy.io import matlab  # noqa: PLC0415 (for this layout alone)

    file = io.BytesIO(storage.read_bytes(table))
    broken = (ValueError, NotImplementedError, TypeError, IndexError, EOFError, zlib.error)
    try:
        data = matlab.loadmat(file, simplify_cells=True)
        found = {name for name in data if not name.startswith("__")}
        needed = {"panoIds", "utm", *(outer for outer, _ in _SETS.values())}
        lacking = sorted(needed - found)
        lacking += [
            f"{outer}.{inner}"
            for outer, inner in _SETS.values()
            if outer in found and inner not in data[outer]
        ]
    except (*broken, matlab.MatReadError) as error:
        raise ValueError(
            f"{table}: expected a file of MATLAB's (before version 7.3), got {error}. Download it "
            "again."
        ) from error
    if lacking:
        raise ValueError(
            f"{table}: expected CVACT's panoIds, utm, trainSet.trainInd and valSet.valInd, got "
            f"{sorted(found)}; {lacking} lack. Download it again."
        )
    return data
