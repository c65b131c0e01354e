import numpy as np
import pytest
from rasterio import warp

from cvmatch.data import images
from cvmatch.data.layouts import find
from cvmatch.data.layouts.rows import check_disjoint
from cvmatch.data.pairs import PairDataset, check_pictures, plan, read_pictures
from cvmatch.data.settings import Ingest
from tests.helpers.cvact import UTM, write_list, write_pictures
from tests.helpers.cvusa import picture, put
from tests.helpers.own_pairs import WIDTH

BAND = np.full((64, WIDTH, 3), 60, np.uint8) + np.arange(64, dtype=np.uint8)[:, None, None]
BAND[:, 80:96] = 200  # what tells where it looks
IDS = ["0zAXsCYTaCy_VNMrsV9f_Q", "kAP7l7Y5Rd5sOm_gmyQaZA", "FZQCJIrZ4oXTMPU0AvCnpA"]


def write_three(root):
    for pair_id in IDS:
        write_pictures(root, pair_id, BAND, picture())
    write_list(root, IDS, [3, 1], [2])


def test_pairs_are_those_of_the_numbers_with_their_positions(tmp_path):
    write_three(tmp_path / "CVACT")
    layout = find.find(str(tmp_path))
    rows = layout.read_rows("train")
    assert [row.pair_id for row in rows] == [IDS[2], IDS[0]]
    assert [row.pair_id for row in layout.read_rows("val")] == [IDS[1]]
    east, north = UTM
    (longitude,), (latitude,) = warp.transform("EPSG:32755", "EPSG:4326", [east], [north])[:2]
    assert rows[1].position == pytest.approx((latitude, longitude), abs=1e-8)
    pairs, rejects = plan(layout, rows)
    assert not rejects
    assert pairs["ground_file"].to_pylist()[1].endswith(f"streetview/{IDS[0]}_grdView.jpg")


def test_spheres_become_the_band_of_all_models_with_north_in_the_middle(tmp_path):
    write_three(tmp_path)
    pairs, _ = plan(find.find(str(tmp_path)), find.find(str(tmp_path)).read_rows("val"))
    (read,) = read_pictures(pairs, str(tmp_path)).to_pylist()
    assert read["error"] is None
    band = images.decode(read["ground"]).astype(float)
    assert band.shape == BAND.shape
    assert np.abs(band - BAND).mean() < 4  # of a JPEG


def test_ids_without_pictures_and_broken_pictures_are_named(tmp_path):
    write_three(tmp_path)
    (tmp_path / f"ANU_data_small/satview_polish/{IDS[2]}_satView_polish.jpg").unlink()
    put(tmp_path / f"ANU_data_small/streetview/{IDS[0]}_grdView.jpg", b"<html>")
    pairs, (reject,) = plan(find.find(str(tmp_path)), find.find(str(tmp_path)).read_rows("train"))
    assert (reject["pair_id"], reject["reason"]) == (IDS[2], "no such file")
    (fault,) = check_pictures(pairs, str(tmp_path)).to_pylist()
    assert (fault["pair_id"], "not a PNG" in fault["reason"]) == (IDS[0], True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utm": None}, r"\['utm'\] lack"),
        ({"trainSet": {"numbers": [1]}}, r"\['trainSet\.trainInd'\] lack"),
        ({"utm": np.zeros((2, 2))}, "got 3 panoIds, 2 rows of utm"),
        ({"trainSet": {"trainInd": np.array([[0], [1]])}}, r"the numbers \[0\]"),
        ({"trainSet": {"trainInd": np.array([[4]])}}, r"the numbers \[4\]"),
        ({"trainSet": {"trainInd": np.array([[1], [1]])}}, "expected each id once"),
    ],
)
def test_list_that_cannot_be_right_is_refused(tmp_path, changes, message):
    write_list(tmp_path, IDS, [1], [2], **changes)
    with pytest.raises(ValueError, match=message):
        find.find(str(tmp_path)).read_rows("train")


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs", b"\x00" * 600])
def test_file_that_is_not_matlabs_says_so(tmp_path, data):
    put(tmp_path / "act_data.MAT", data)
    with pytest.raises(ValueError, match=r"act_data\.MAT: expected a file of MATLAB's"):
        find.find(str(tmp_path)).read_rows("train")


def test_pair_of_both_splits_is_refused(tmp_path):
    write_list(tmp_path, IDS, [1, 2], [2, 3])
    layout = find.find(str(tmp_path))
    with pytest.raises(ValueError, match=f"no id in both, got 1: {IDS[1]}"):
        check_disjoint(layout, "train", layout.read_rows("train"))


@pytest.mark.ray
def test_cvact_is_opened_as_any_other(ray_session, tmp_path):
    write_three(tmp_path)
    pairs = PairDataset.open(Ingest(root=str(tmp_path), split="train"))
    rows = pairs.rows().take_all()
    assert {row["pair_id"] for row in rows} == {IDS[0], IDS[2]}
    assert all(row["error"] is None for row in rows)
