from pathlib import Path
from urllib.parse import quote

import pytest

from cvmatch.data.layouts import cvusa, find
from cvmatch.data.layouts.rows import check_disjoint
from cvmatch.data.pairs import plan
from tests.helpers.cvusa import picture, put, subset_line, write_pair, write_tables


def planned(root: Path | str, split: str = "train"):
    found = find.find(str(root))
    pairs, rejects = plan(found, found.read_rows(split))
    return {row["pair_id"]: row for row in pairs.to_pylist()}, rejects


def test_plan_subset_rows_that_lie_resolve_to_the_files_on_disk(subset):
    train, rejects = planned(subset)
    val, _ = planned(subset, "val")
    assert not rejects
    assert list(train) == [f"{n:07d}" for n in (44192, 8, 300, 12, 9, 10, 11, 7)]
    assert train["0044192"]["aerial_file"] == "bingmap/input0044192.png"
    assert train["0044192"]["ground_file"] == "streetview/0044192.jpg"
    assert val["0000002"]["ground_file"] == "streetview/0000002.jpg"
    assert train["0000008"]["classes_file"] == "segmap/output0000008.png"
    assert train["0000012"]["classes_file"] is None
    assert train["0000008"]["latitude"] is None


def test_plan_official_takes_zoom_19_and_the_position_of_line_id(official):
    rows, rejects = planned(official)
    assert not rejects
    assert rows["0000003"]["aerial_file"] == "bingmap/19/0000003.jpg"
    assert rows["0000003"]["ground_file"] == "streetview/panos/0000003.jpg"
    assert (rows["0000003"]["latitude"], rows["0000003"]["longitude"]) == (32.5, -102.25)
    assert (rows["0000005"]["latitude"], rows["0000005"]["longitude"]) == (None, None)
    assert {row["classes_file"] for row in rows.values()} == {None}


@pytest.mark.parametrize("above", [0, 1, 2])
def test_find_root_above_the_data_set_finds_it(subset, above):
    given = subset.parents[above - 1] if above else subset
    assert find.find(str(given)).root == str(subset)
    uri = "file://" + quote(str(given))
    assert find.find(uri).root == "file://" + quote(str(subset))


def test_find_two_data_sets_names_both(subset, tmp_path):
    write_tables(tmp_path / "x" / "one", [], [])
    write_tables(tmp_path / "x" / "two", [], [])
    with pytest.raises(ValueError, match=r"one data set.*/one.*/two.*ends in \.root"):
        find.find(str(tmp_path / "x"))


def test_find_nothing_says_what_was_expected_and_found(tmp_path):
    put(tmp_path / "holiday.jpg", b"")
    with pytest.raises(ValueError, match=r"train-19zl\.csv.*holiday\.jpg.*ends in \.root"):
        find.find(str(tmp_path))
    with pytest.raises(ValueError, match=r"absent: expected train-19zl\.csv"):
        find.find(str(tmp_path / "absent"))


def test_find_plain_tiles_says_how_they_come_into_an_index(tmp_path):
    put(tmp_path / "tiles" / "a.png", picture())
    with pytest.raises(ValueError, match=r"Parquet rows of pair_id and aerial .*--rows"):
        find.find(str(tmp_path / "tiles"))
    put(tmp_path / "texts" / "a.txt", b"")
    with pytest.raises(ValueError, match="expected train-19zl") as told:
        find.find(str(tmp_path / "texts"))
    assert "--rows" not in str(told.value)


@pytest.mark.parametrize("kind", ["nothing", "two"])
def test_find_error_names_no_flag_of_another_job(tmp_path, kind):
    if kind == "two":
        write_tables(tmp_path / "one", [], [])
        write_tables(tmp_path / "two", [], [])
    with pytest.raises(ValueError, match=r"this job's flag that ends in \.root") as told:
        find.find(str(tmp_path))
    assert not any(flag in str(told.value) for flag in ("--data", "--val", "--tiles"))


def test_plan_capitalised_folders_and_endings_are_found(tmp_path):
    put(tmp_path / "Bingmap/input0000001.PNG", picture())
    put(tmp_path / "StreetView/input0000001.png", picture())
    put(tmp_path / "Segmap/output0000001.png", picture())
    write_tables(tmp_path, [subset_line(1)], [])
    rows, rejects = planned(tmp_path)
    assert not rejects
    assert rows["0000001"]["aerial_file"] == "Bingmap/input0000001.PNG"
    assert rows["0000001"]["ground_file"] == "StreetView/input0000001.png"
    assert rows["0000001"]["classes_file"] == "Segmap/output0000001.png"


def test_plan_stated_name_that_exists_wins_over_others(tmp_path):
    for name in ("input0000001.png", "input0000001.jpg", "0000001.jpg", "0000001.png"):
        put(tmp_path / "streetview" / name, picture())
    put(tmp_path / "bingmap/input0000001.png", picture())
    write_tables(tmp_path, [subset_line(1, "png")], [])
    assert planned(tmp_path)[0]["0000001"]["ground_file"] == "streetview/input0000001.png"


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_read_rows_header_bom_blank_lines_and_spaces_are_no_rows(tmp_path, start):
    text = f"{start}satellite_path,ground_path\r\n\r\n bingmap/1.jpg , streetview/1.jpg \r\n\r\n"
    put(tmp_path / "t.csv", text.encode())
    rows = cvusa.read_rows(str(tmp_path / "t.csv"))
    assert [(r.pair_id, r.aerial, r.ground) for r in rows] == [
        ("0000001", "bingmap/1.jpg", "streetview/1.jpg")
    ]


def test_read_rows_first_line_without_header_is_a_row(subset):
    assert cvusa.read_rows(str(subset / "train-19zl.csv"))[0].pair_id == "0044192"


def test_read_rows_repeated_id_names_it_with_file_and_lines(tmp_path):
    lines = [subset_line(4), subset_line(5), "bingmap/4.jpg,streetview/4.jpg"]
    write_tables(tmp_path, lines, [])
    with pytest.raises(ValueError, match=r"train-19zl\.csv.*0000004 \(lines 1 and 3\)"):
        cvusa.read_rows(str(tmp_path / "train-19zl.csv"))


@pytest.mark.parametrize("text", [b"", b"\r\n", b"satellite_path,ground_path\n"])
def test_read_rows_empty_split_is_refused(tmp_path, text):
    put(tmp_path / "val-19zl.csv", text)
    with pytest.raises(ValueError, match=r"val-19zl\.csv.*empty split"):
        cvusa.read_rows(str(tmp_path / "val-19zl.csv"))


def test_read_rows_binary_file_is_refused_by_name(tmp_path):
    put(tmp_path / "train-19zl.csv", picture())
    with pytest.raises(ValueError, match=r"train-19zl\.csv: expected a CSV in UTF-8"):
        cvusa.read_rows(str(tmp_path / "train-19zl.csv"))


def test_check_disjoint_id_in_two_splits_names_it_and_both_files(tmp_path):
    write_tables(tmp_path, [subset_line(1), subset_line(2)], [subset_line(2), subset_line(3)])
    found = find.find(str(tmp_path))
    rows = cvusa.read_rows(found.tables["val"])
    with pytest.raises(ValueError, match=r"val-19zl\.csv and .*train-19zl\.csv.*1: 0000002"):
        check_disjoint(found, "val", rows)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("bingmap/input0000001.png", "expected an aerial and a ground path"),
        ("bingmap/input0000001.png,streetview/0000002.jpg", "ground is another id's"),
        ("bingmap/._input0000001.png,streetview/._0000001.jpg", "not named by an id"),
        ("bingmap/../../0000001.png,streetview/0000001.jpg", "leaves the data root"),
        ("bingmap/input0000001.png,/etc/0000001.jpg", "leaves the data root"),
        ("bingmap/input0000001.png,..\\0000001.jpg", "leaves the data root"),
        ("bingmap/input0000001.png,C:\\x\\0000001.jpg", "leaves the data root"),
        ("bingmap/input0000001.png,s3://other/0000001.jpg", "leaves the data root"),
        ("bingmap/input0000099.png,streetview/0000099.jpg", "no such file"),
        ("nowhere/input0000001.png,streetview/0000001.jpg", "no such file"),
    ],
)
def test_plan_bad_line_is_rejected_with_its_reason(tmp_path, line, reason):
    write_pair(tmp_path, 1)
    write_pair(tmp_path, 2)
    put(tmp_path.parent / "0000001.png", picture())  # what `..` would reach
    write_tables(tmp_path, [line, subset_line(2)], [])
    rows, rejects = planned(tmp_path)
    assert list(rows) == ["0000002"]
    assert len(rejects) == 1
    assert reason in (rejects[0]["reason"] or "")
    assert rejects[0]["file"] in line.split(",")


def test_plan_mac_metadata_row_is_no_repeated_id(tmp_path):
    write_pair(tmp_path, 1)
    hidden = "bingmap/._input0000001.png,streetview/._input0000001.jpg"
    write_tables(tmp_path, [subset_line(1), hidden], [])
    rows, rejects = planned(tmp_path)
    assert list(rows) == ["0000001"]
    assert rejects[0]["file"] == "bingmap/._input0000001.png"


def test_read_positions_header_and_gaps_keep_line_i_with_id_i(tmp_path):
    put(tmp_path / "all.csv", b"sat_lat,sat_lon\n1.5,2.5,0,0\n\n-3.5,4.5\n")
    assert cvusa.read_positions(str(tmp_path / "all.csv")) == [(1.5, 2.5), None, (-3.5, 4.5)]


@pytest.mark.parametrize("line", ["200.0,2.0", "2.0,-181", "x,y", "5.0", "nan,3.0"])
def test_read_positions_impossible_place_names_the_line(tmp_path, line):
    put(tmp_path / "all.csv", f"1.5,2.5\n{line}\n".encode())
    with pytest.raises(ValueError, match=r"all\.csv line 2: expected latitude"):
        cvusa.read_positions(str(tmp_path / "all.csv"))


def test_plan_finds_names_of_any_case_and_ending(tmp_path):
    write_pair(tmp_path, 1)
    put(tmp_path / "Bingmap2/INPUT0000002.PNG", picture())
    put(tmp_path / "streetview/0000002.Jpg", picture())
    put(tmp_path / "streetview/0000003.jfif", picture())
    put(tmp_path / "streetview/0000004.JPE", picture())
    lines = [subset_line(1), "bingmap2/input0000002.png,streetview/0000002.jpg"]
    lines += [f"bingmap2/0000002.png,streetview/000000{n}.jpg".replace("2/0000002", f"/{n:07d}")
              for n in (3, 4)]  # fmt: skip
    for number in (3, 4):
        put(tmp_path / f"bingmap/{number:07d}.Jpeg", picture())
    write_tables(tmp_path, lines, [])
    (tmp_path / "train-19zl.csv").rename(tmp_path / "Train-19zl.CSV")
    put(tmp_path / "ALL.csv", b"1,2\n3,4\n")
    rows, rejects = planned(tmp_path)
    assert not rejects
    assert {row["ground_file"] for row in rows.values()} == {
        "streetview/0000001.jpg", "streetview/0000002.Jpg", "streetview/0000003.jfif",
        "streetview/0000004.JPE",
    }  # fmt: skip
    assert rows["0000002"]["aerial_file"] == "Bingmap2/INPUT0000002.PNG"
    assert rows["0000002"]["latitude"] == 3


def test_plan_of_two_names_that_differ_in_case_takes_the_one_that_is_stated(tmp_path):
    write_pair(tmp_path, 1)
    put(tmp_path / "streetview/0000001.JPG", picture())
    write_tables(tmp_path, ["bingmap/input0000001.png,streetview/0000001.JPG"], [])
    assert planned(tmp_path)[0]["0000001"]["ground_file"] == "streetview/0000001.JPG"
    write_tables(tmp_path, ["bingmap/input0000001.png,streetview/0000001.jpg"], [])
    assert planned(tmp_path)[0]["0000001"]["ground_file"] == "streetview/0000001.jpg"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_tables_as_spreadsheets_save_them_are_read(tmp_path, delimiter, encoding):
    write_pair(tmp_path, 1)
    cells = ["aerial", "ground"], ["bingmap/input0000001.png", "streetview/0000001.jpg"]
    text = "".join(delimiter.join(row) + "\r\n" for row in cells)
    put(tmp_path / "train-19zl.csv", text.encode(encoding))
    comma = "," if delimiter == ";" else "."
    put(tmp_path / "all.csv", f"46{comma}95{delimiter}7{comma}44\n".encode(encoding))
    rows, rejects = planned(tmp_path)
    assert not rejects
    assert (rows["0000001"]["latitude"], rows["0000001"]["longitude"]) == (46.95, 7.44)


def test_tables_of_paths_with_semicolons_are_split_at_commas(tmp_path):
    put(tmp_path / "a;b/input0000001.png", picture())
    put(tmp_path / "streetview/0000001.jpg", picture())
    write_tables(tmp_path, ["a;b/input0000001.png,streetview/0000001.jpg"], [])
    assert not planned(tmp_path)[1]


def test_absolute_paths_are_taken_where_they_are_below_the_root(tmp_path):
    root = tmp_path / "a b"
    write_pair(root, 1)
    write_pair(root, 2)
    lines = [f"{root}/bingmap/input0000001.png,{root}/streetview/0000001.jpg"]
    lines += ["/elsewhere/bingmap/input0000002.png,/elsewhere/streetview/0000002.jpg"]
    write_tables(root, lines, [])
    for place in (str(root), "file://" + quote(str(root))):
        rows, (reject,) = planned(place)
        assert rows["0000001"]["aerial_file"] == "bingmap/input0000001.png"
        assert "leaves the data root" in str(reject["reason"])
