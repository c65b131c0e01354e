import numpy as np
import pytest

from cvmatch.data import images
from cvmatch.data.layouts import find, own_pairs
from cvmatch.data.layouts.rows import check_disjoint
from cvmatch.data.pairs import PairDataset, check_pictures, plan, read_pictures
from cvmatch.data.settings import Ingest
from tests.helpers.cvusa import picture, put, subset_line, write_pair, write_tables
from tests.helpers.own_pairs import WIDTH, pad_to_sphere, write_table
from tests.helpers.photo import save, xmp_of

BAND = np.random.default_rng(0).integers(0, 255, (64, 1, 3), np.uint8) + np.zeros(
    (64, WIDTH, 3), np.uint8
)
BAND[:, 80:96] = 250  # what tells where it looks


def write_files(root, *names):
    for name in names:
        put(root / name, picture())


def planned(root, split="train"):
    found = find.find(str(root))
    pairs, rejects = plan(found, found.read_rows(split))
    return pairs, rejects


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_in_any_order_and_case_beside_others_are_read(tmp_path, delimiter):
    write_files(tmp_path, "a/one.jpg", "b/x.png", "c/x.png")
    comma = "," if delimiter == ";" else "."
    row = {
        "Longitude": f"7{comma}44",
        "note": "mine",
        "TILE": "b/x.png",
        "Panorama": "a/one.jpg",
        "latitude": f"46{comma}95",
        "classes": "c/x.png",
        "pair_id": "home",
        "heading": f"-12{comma}5",
    }
    write_table(tmp_path / "train.csv", [row], delimiter)
    pairs, rejects = planned(tmp_path)
    assert not rejects
    assert pairs.to_pylist() == [
        {
            "pair_id": "home",
            "aerial_file": "b/x.png",
            "ground_file": "a/one.jpg",
            "classes_file": "c/x.png",
            "latitude": 46.95,
            "longitude": 7.44,
            "heading": -12.5,
        }
    ]


def test_what_is_not_stated_is_unknown_and_the_tile_names_the_pair(tmp_path):
    write_files(tmp_path, "one.jpg", "b/x.png")
    write_table(tmp_path / "train.csv", [{"panorama": "one.jpg", "tile": "b/x.png"}])
    (row,) = planned(tmp_path)[0].to_pylist()
    assert row["pair_id"] == "x"
    unknown = ("classes_file", "latitude", "longitude", "heading")
    assert [row[name] for name in unknown] == [None] * 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tile": ""}, "line 3: expected a panorama and a tile"),
        ({"tile": "b/absent.png"}, "no such file"),
        ({"panorama": "../one.jpg"}, "leaves the data root"),
        ({"classes": "absent.png"}, "no such file"),
        ({"latitude": "91"}, "line 3: expected latitude"),
        ({"longitude": ""}, "line 3: expected latitude and longitude in degrees"),
        ({"latitude": "nan"}, "line 3: expected latitude"),
        ({"heading": "north"}, "line 3: expected a heading in degrees"),
        ({"heading": "1e9"}, "line 3: expected a heading in degrees"),
    ],
)
def test_bad_line_is_rejected_with_its_reason(tmp_path, changes, reason):
    write_files(tmp_path, "one.jpg", "b/x.png", "b/y.png")
    put(tmp_path.parent / "one.jpg", picture())
    good = {
        "panorama": "one.jpg",
        "tile": "b/x.png",
        "latitude": "1",
        "longitude": "2",
        "heading": "",
        "classes": "",
    }
    write_table(tmp_path / "train.csv", [good, {**good, "tile": "b/y.png", **changes}])
    pairs, (reject,) = planned(tmp_path)
    assert pairs["pair_id"].to_pylist() == ["x"]
    assert reason in str(reject["reason"])


def test_id_twice_names_both_lines(tmp_path):
    rows = [{"panorama": "one.jpg", "tile": f"{n}/x.png"} for n in range(2)]
    write_table(tmp_path / "train.csv", rows)
    with pytest.raises(ValueError, match=r"train\.csv: expected each id once.*x \(lines 2 and 3\)"):
        own_pairs.read_rows(str(tmp_path / "train.csv"))


def test_table_without_the_columns_is_named_with_those_that_lack(tmp_path):
    write_table(tmp_path / "train.csv", [{"panorama": "one.jpg", "tile": "x.png"}])
    write_table(tmp_path / "val.csv", [{"photo": "one.jpg", "tile": "x.png"}])
    found = find.find(str(tmp_path))
    with pytest.raises(ValueError, match=r"val\.csv: expected a first line.*\['panorama'\] lack"):
        found.read_rows("val")
    (tmp_path / "train.csv").unlink()
    with pytest.raises(ValueError, match=r"or train\.csv or val\.csv with the columns panorama"):
        find.find(str(tmp_path))


def test_picture_of_a_like_name_is_not_taken_for_another(tmp_path):
    write_files(tmp_path, "a.jpg", "input_12.png", "A2.PNG")
    rows = [
        {"panorama": "a.jpg", "tile": "a.png", "classes": ""},  # its panorama's name
        {"panorama": "a.jpg", "tile": "input_12.png", "classes": "output_12.png"},
        {"panorama": "a.jpg", "tile": "a2.png", "classes": ""},
    ]
    write_table(tmp_path / "train.csv", rows)
    pairs, rejects = planned(tmp_path)
    assert pairs["aerial_file"].to_pylist() == ["A2.PNG"]
    assert [(one["file"], one["reason"]) for one in rejects] == [
        ("a.png", "no such file"), ("output_12.png", "no such file"),
    ]  # fmt: skip


def test_picture_in_both_splits_is_refused_whatever_the_ids(tmp_path):
    write_files(tmp_path, "one.jpg", "x.png")
    row = {"panorama": "one.jpg", "tile": "x.png", "pair_id": "a"}
    write_table(tmp_path / "train.csv", [row])
    write_table(tmp_path / "val.csv", [{**row, "pair_id": "b", "panorama": "two.jpg"}])
    found = find.find(str(tmp_path))
    with pytest.raises(ValueError, match=r"no picture in both, got 1: x\.png"):
        check_disjoint(found, "train", found.read_rows("train"))


def test_tile_of_several_pairs_is_told(tmp_path, caplog):
    rows = [{"panorama": f"{n}.jpg", "tile": "x.png", "pair_id": n} for n in range(2)]
    write_table(tmp_path / "train.csv", rows)
    assert len(own_pairs.read_rows(str(tmp_path / "train.csv"))) == 2
    assert "1 tiles stand in several lines, such as x.png" in caplog.text


def test_table_of_somebody_elses_does_not_hide_a_data_set(tmp_path):
    put(tmp_path / "notes/train.csv", "Straße;Größe\n".encode("latin-1"))
    write_table(tmp_path / "mine/train.csv", [{"panorama": "one.jpg", "tile": "x.png"}])
    assert find.find(str(tmp_path)).root.endswith("mine")


def test_layout_of_cvusa_goes_first(tmp_path):
    write_pair(tmp_path, 1)
    write_tables(tmp_path, [subset_line(1)], [])
    write_table(tmp_path / "train.csv", [{"panorama": "one.jpg", "tile": "x.png"}])
    assert find.find(str(tmp_path)).tables["train"].endswith("train-19zl.csv")


@pytest.mark.parametrize("says", ["table", "file"])
def test_photos_become_bands_with_north_in_the_middle(tmp_path, says):
    turned = pad_to_sphere(np.roll(BAND, -WIDTH // 4, axis=1))  # its middle looks east
    xmp = xmp_of(ProjectionType="equirectangular", PoseHeadingDegrees=90)
    put(tmp_path / "one.png", save(turned, "PNG", xmp if says == "file" else b""))
    write_files(tmp_path, "x.png")
    heading = "90" if says == "table" else ""
    row = {"panorama": "one.png", "tile": "x.png", "heading": heading}
    write_table(tmp_path / "train.csv", [row])
    pairs, _ = planned(tmp_path)
    (read,) = read_pictures(pairs, str(tmp_path)).to_pylist()
    assert read["error"] is None
    band = images.decode(read["ground"]).astype(float)
    assert band.shape == BAND.shape
    assert np.abs(band - BAND).mean() < 2


def test_picture_that_is_no_panorama_is_a_fault_and_says_what_helps(tmp_path):
    put(tmp_path / "one.jpg", picture(size=(40, 30), kind="JPEG"))
    write_files(tmp_path, "x.png")
    write_table(tmp_path / "train.csv", [{"panorama": "one.jpg", "tile": "x.png"}])
    pairs, _ = planned(tmp_path)
    (fault,) = check_pictures(pairs, str(tmp_path)).to_pylist()
    assert fault["file"] == "one.jpg"
    assert "no panorama of a whole turn" in fault["reason"]
    (read,) = read_pictures(pairs, str(tmp_path)).to_pylist()
    assert read["ground"] is None
    assert read["error"].startswith("ground one.jpg: 40 x 30 pixels")


@pytest.mark.ray
def test_data_set_of_own_pairs_is_opened_as_any_other(ray_session, tmp_path):
    put(tmp_path / "one.png", save(pad_to_sphere(BAND), "PNG"))
    write_files(tmp_path, "x.png")
    write_table(tmp_path / "val.csv", [{"panorama": "one.png", "tile": "x.png"}])
    pairs = PairDataset.open(Ingest(root=str(tmp_path), split="val"))
    (row,) = pairs.rows().take_all()
    assert (row["pair_id"], row["error"], pairs.count) == ("x", None, 1)
    assert images.decode(row["ground"]).shape == BAND.shape
    with pytest.raises(ValueError, match=r"expected train\.csv beside"):
        PairDataset.open(Ingest(root=str(tmp_path), split="train"))
