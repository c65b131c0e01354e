"""The fixtures write CVUSA's quirks by hand, so that they do not share an error with cvmatch.world."""

import io
import json
import os
import zlib
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cvmatch import engine, layout, schema
from cvmatch.ingest import Ingest, check_pictures, ingest, plan, read_pictures, rejected

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def picture(colour=(10, 20, 30), size=(16, 8), kind="PNG", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def colour_of(number: int) -> tuple[int, int, int]:
    return (number % 256, 7 * number % 256, 200)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_pair(root: Path, number: int, segmap: bool = True) -> None:
    """One place of the subset, under the files' true names."""
    put(root / f"bingmap/input{number:07d}.png", picture(colour_of(number)))
    put(root / f"streetview/{number:07d}.jpg", picture(colour_of(number), kind="JPEG"))
    if segmap:
        put(root / f"segmap/output{number:07d}.png", picture((0, 255, 0)))


def subset_line(number: int, ending: str = "jpg") -> str:
    """As the published CSVs have it: an `input` too many, column 3 repeats column 2."""
    ground = f"streetview/input{number:07d}.{ending}"
    return f"bingmap/input{number:07d}.png,{ground},{ground}"


def write_tables(root: Path, train: list[str], val: list[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "train-19zl.csv").write_bytes("\r\n".join(train).encode())  # no newline at the end
    (root / "val-19zl.csv").write_bytes("".join(f"{line}\r\n" for line in val).encode())


@pytest.fixture
def subset(tmp_path) -> Path:
    """Eight training pairs, in no order and one without a segmap; two val pairs, rows say .png."""
    root = tmp_path / "a b%20é" / "CVUSA_subset" / "CVUSA_subset"
    train = [44192, 8, 300, 12, 9, 10, 11, 7]
    for number in [*train, 1, 2]:
        write_pair(root, number, segmap=number != 12)
    put(root / "streetview/._0000008.jpg", b"\0\5\x16\7 Mac OS X")
    put(root / "bingmap/._input0000008.png", b"\0\5\x16\7 Mac OS X")
    put(root.parent / "__MACOSX/CVUSA_subset/train-19zl.csv", b"\0\5\x16\7 Mac OS X")
    write_tables(root, [subset_line(n) for n in train], [subset_line(n, "png") for n in (1, 2)])
    return root


@pytest.fixture
def official(tmp_path) -> Path:
    root = tmp_path / "CVPR_subset"
    for number in (1, 2, 3, 5):
        put(root / f"bingmap/19/{number:07d}.jpg", picture(colour_of(number), kind="JPEG"))
        put(root / f"bingmap/18/{number:07d}.jpg", picture((0, 0, 0), kind="JPEG"))
        put(root / f"streetview/panos/{number:07d}.jpg", picture(colour_of(number), kind="JPEG"))
        put(root / f"streetview/annotations/{number:07d}.png", picture(mode="L"))
    lines = [
        f"bingmap/19/{n:07d}.jpg,streetview/panos/{n:07d}.jpg,streetview/annotations/{n:07d}.png\n"
        for n in (3, 1, 5, 2)
    ]
    put(root / "splits/train-19zl.csv", "".join(lines[:3]).encode())
    put(root / "splits/val-19zl.csv", lines[3].encode())
    places = [f"{30 + i}.5,-{100 + i}.25,1.0,2.0,0" for i in range(4)]
    put(root / "split_locations/all.csv", "\n".join(places).encode())
    return root


def planned(root: Path | str, split: str = "train"):
    found = layout.find(str(root))
    pairs, rejects = plan(found, layout.read_rows(found.tables[split]))
    return {row["pair_id"]: row for row in pairs.to_pylist()}, rejects


def mean_colour(data: bytes) -> tuple[int, ...]:
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((3, 3))  # pyright: ignore


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
    assert layout.find(str(given)).root == str(subset)
    uri = "file://" + quote(str(given))
    assert layout.find(uri).root == "file://" + quote(str(subset))


def test_find_two_data_sets_names_both(subset, tmp_path):
    write_tables(tmp_path / "x" / "one", [], [])
    write_tables(tmp_path / "x" / "two", [], [])
    with pytest.raises(ValueError, match=r"one CVUSA data set.*/one.*/two.*--data\.root"):
        layout.find(str(tmp_path / "x"))


def test_find_nothing_says_what_was_expected_and_found(tmp_path):
    put(tmp_path / "holiday.jpg", b"")
    with pytest.raises(ValueError, match=r"train-19zl\.csv.*holiday\.jpg.*--data\.root"):
        layout.find(str(tmp_path))
    with pytest.raises(ValueError, match=r"absent: expected train-19zl\.csv"):
        layout.find(str(tmp_path / "absent"))


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
    rows = layout.read_rows(str(tmp_path / "t.csv"))
    assert [(r.pair_id, r.aerial, r.ground) for r in rows] == [
        ("0000001", "bingmap/1.jpg", "streetview/1.jpg")
    ]


def test_read_rows_first_line_without_header_is_a_row(subset):
    assert layout.read_rows(str(subset / "train-19zl.csv"))[0].pair_id == "0044192"


def test_read_rows_repeated_id_names_it_with_file_and_lines(tmp_path):
    lines = [subset_line(4), subset_line(5), "bingmap/4.jpg,streetview/4.jpg"]
    write_tables(tmp_path, lines, [])
    with pytest.raises(ValueError, match=r"train-19zl\.csv.*0000004 \(lines 1 and 3\)"):
        layout.read_rows(str(tmp_path / "train-19zl.csv"))


@pytest.mark.parametrize("text", [b"", b"\r\n", b"satellite_path,ground_path\n"])
def test_read_rows_empty_split_is_refused(tmp_path, text):
    put(tmp_path / "val-19zl.csv", text)
    with pytest.raises(ValueError, match=r"val-19zl\.csv.*empty split"):
        layout.read_rows(str(tmp_path / "val-19zl.csv"))


def test_read_rows_binary_file_is_refused_by_name(tmp_path):
    put(tmp_path / "train-19zl.csv", picture())
    with pytest.raises(ValueError, match=r"train-19zl\.csv: expected a CSV in UTF-8"):
        layout.read_rows(str(tmp_path / "train-19zl.csv"))


def test_check_apart_id_in_two_splits_names_it_and_both_files(tmp_path):
    write_tables(tmp_path, [subset_line(1), subset_line(2)], [subset_line(2), subset_line(3)])
    found = layout.find(str(tmp_path))
    rows = layout.read_rows(found.tables["val"])
    with pytest.raises(ValueError, match=r"val-19zl\.csv and .*train-19zl\.csv.*1: 0000002"):
        layout.check_apart(found, "val", rows)


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
    assert layout.read_positions(str(tmp_path / "all.csv")) == [(1.5, 2.5), None, (-3.5, 4.5)]


@pytest.mark.parametrize("line", ["200.0,2.0", "2.0,-181", "x,y", "5.0", "nan,3.0"])
def test_read_positions_impossible_place_names_the_line(tmp_path, line):
    put(tmp_path / "all.csv", f"1.5,2.5\n{line}\n".encode())
    with pytest.raises(ValueError, match=r"all\.csv line 2: expected latitude"):
        layout.read_positions(str(tmp_path / "all.csv"))


def plan_of(**files: str | None) -> pa.Table:
    row = {"pair_id": "0000001", "latitude": None, "longitude": None, **files}
    names = ["pair_id", "aerial_file", "ground_file", "classes_file", "latitude", "longitude"]
    kinds = [pa.string()] * 4 + [pa.float64()] * 2
    return pa.Table.from_pylist([row], schema=pa.schema(list(zip(names, kinds, strict=True))))


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 100,000 x 100,000 pixels."""
    data = bytearray(picture())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("column", ["aerial_file", "ground_file", "classes_file"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no such file"),
        (b"", "empty file"),
        (picture(kind="JPEG", size=(64, 64))[:-60], "cannot be decoded"),
        (b"\0\5\x16\7 Mac OS X", "not a PNG or JPEG"),
        (picture(mode="CMYK", kind="JPEG"), "mode CMYK"),
        (picture(mode="P"), "mode P"),
        (picture(mode="I;16"), "mode I;16"),
        (picture(mode="RGBA"), "mode RGBA"),
        (picture(kind="TIFF"), "not a PNG or JPEG"),
        (bomb(), "10000000000 pixels"),
    ],
    ids=["gone", "empty", "cut", "mac", "cmyk", "palette", "16-bit", "alpha", "tiff", "bomb"],
)
def test_check_pictures_bad_file_is_named_with_its_reason(tmp_path, column, data, reason):
    write_pair(tmp_path, 1)
    files = {
        "aerial_file": "bingmap/input0000001.png",
        "ground_file": "streetview/0000001.jpg",
        "classes_file": "segmap/output0000001.png",
    }
    assert check_pictures(plan_of(**files), str(tmp_path)).to_pylist() == [
        {"pair_id": "0000001", "file": None, "reason": None}
    ]
    target = tmp_path / files[column]
    target.unlink() if data is None else target.write_bytes(data)
    (verdict,) = check_pictures(plan_of(**files), str(tmp_path)).to_pylist()
    assert verdict["file"] == files[column]
    assert reason in verdict["reason"]


def test_check_pictures_grey_tile_is_good_and_grey_class_map_is_not(tmp_path):
    put(tmp_path / "1.png", picture(mode="L"))
    put(tmp_path / "2.png", picture())
    good = plan_of(aerial_file="1.png", ground_file="2.png", classes_file=None)
    bad = plan_of(aerial_file="2.png", ground_file="2.png", classes_file="1.png")
    assert check_pictures(good, str(tmp_path))["reason"].to_pylist() == [None]
    assert "mode L, expected RGB" in check_pictures(bad, str(tmp_path))["reason"][0].as_py()


def test_read_pictures_vanished_file_is_an_error_in_its_row(tmp_path):
    put(tmp_path / "1.png", picture())
    rows = plan_of(aerial_file="1.png", ground_file="gone.jpg", classes_file=None)
    table = read_pictures(rows, str(tmp_path))
    assert table.schema == schema.PAIRS
    (row,) = table.to_pylist()
    assert row["aerial"] == picture()
    assert row["ground"] is None
    assert row["error"] == "ground gone.jpg: no such file"


@pytest.mark.parametrize("wrong", [{"block": 0}, {"limit": -1}, {"max_rejected": 1.5}])
def test_ingest_config_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected block >= 1"):
        Ingest(**wrong)


def test_ingest_missing_split_names_the_file(subset):
    (subset / "val-19zl.csv").unlink()
    with pytest.raises(ValueError, match=r"expected val-19zl\.csv beside.*train-19zl\.csv"):
        ingest(Ingest(root=str(subset), split="val"))


@pytest.mark.ray
def test_ingest_subset_gives_each_id_its_own_pictures(ray_session, subset):
    rows = ingest(Ingest(root=str(subset.parents[1]), block=3)).take_all()
    assert {row["pair_id"] for row in rows} == {
        f"{n:07d}" for n in (7, 8, 9, 10, 11, 12, 300, 44192)
    }
    for row in rows:
        number = int(row["pair_id"])
        assert row["aerial"] == picture(colour_of(number))
        assert row["ground"] == picture(colour_of(number), kind="JPEG")
        assert (row["classes"] is None) == (number == 12)
        assert row["error"] is None
    assert rejected(Ingest(root=str(subset))) == []


@pytest.mark.ray
def test_ingest_uri_with_space_percent_and_accent_reads_as_the_path_does(ray_session, subset):
    config = Ingest(root="file://" + quote(str(subset)), split="val")
    rows = ingest(config).take_all()
    assert sorted(row["pair_id"] for row in rows) == ["0000001", "0000002"]
    assert all(row["ground"] and not row["error"] for row in rows)


@pytest.mark.ray
def test_ingest_official_with_limit_takes_the_first_lines(ray_session, official):
    rows = ingest(Ingest(root=str(official), limit=2)).take_all()
    places = {row["pair_id"]: (row["latitude"], row["longitude"]) for row in rows}
    assert places == {"0000003": (32.5, -102.25), "0000001": (30.5, -100.25)}
    assert len(ingest(Ingest(root=str(official))).take_all()) == 3


@pytest.mark.ray
def test_ingest_too_many_bad_rows_stops_and_names_them_until_mended(ray_session, subset):
    tile = subset / "bingmap/input0000009.png"
    tile.write_bytes(tile.read_bytes()[:40])
    (subset / "streetview/0000010.jpg").unlink()
    config = Ingest(root=str(subset))
    with pytest.raises(ValueError, match=r"25\.0% \(2\).*rejected\.jsonl.*--data\.max-rejected"):
        ingest(config)
    named = {row["pair_id"]: row["file"] for row in rejected(config)}
    assert named == {
        "0000009": "bingmap/input0000009.png",
        "0000010": "streetview/input0000010.jpg",
    }
    lines = (subset / ".cvmatch/train/rejected.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"pair_id", "file", "reason"}] * 2

    rows = ingest(Ingest(root=str(subset), max_rejected=0.25)).take_all()
    assert {row["pair_id"] for row in rows}.isdisjoint(named)
    assert len(rows) == 6

    for number in (9, 10):
        write_pair(subset, number)
    assert ingest(config).count() == 8  # looked at again without being told to


@pytest.mark.ray
def test_ingest_no_usable_row_stops_whatever_share_is_allowed(ray_session, tmp_path):
    write_tables(tmp_path, [subset_line(1)], [])
    with pytest.raises(ValueError, match=r"100\.0%.*no such file"):
        ingest(Ingest(root=str(tmp_path), max_rejected=1.0))


@pytest.mark.ray
def test_ingest_second_run_trusts_the_check_and_recheck_does_not(ray_session, subset):
    config = Ingest(root=str(subset), split="val", max_rejected=0.5)
    assert ingest(config).count() == 2
    stamp = os.stat(subset / ".cvmatch/val/pairs.parquet").st_mtime_ns
    (subset / "streetview/0000002.jpg").unlink()

    rows = {row["pair_id"]: row for row in ingest(config).take_all()}
    assert os.stat(subset / ".cvmatch/val/pairs.parquet").st_mtime_ns == stamp
    assert rows["0000002"]["error"] == "ground streetview/0000002.jpg: no such file"
    assert rows["0000001"]["error"] is None

    again = Ingest(root=str(subset), split="val", max_rejected=0.5, recheck=True)
    assert [row["pair_id"] for row in ingest(again).take_all()] == ["0000001"]


@pytest.mark.ray
def test_ingest_changed_table_is_checked_again(ray_session, subset):
    config = Ingest(root=str(subset), split="val")
    assert ingest(config).count() == 2
    write_pair(subset, 3)
    lines = "".join(f"{subset_line(n)}\r\n" for n in (1, 2, 3))
    (subset / "val-19zl.csv").write_text(lines)
    assert ingest(config).count() == 3


@pytest.mark.ray
def test_ingest_root_that_takes_no_files_asks_for_a_cache(ray_session, subset, tmp_path):
    put(subset / ".cvmatch", b"a file where the directory would be")
    with pytest.raises(ValueError, match=r"read-only, pass a directory as --data\.cache"):
        ingest(Ingest(root=str(subset), split="val"))
    cache = tmp_path / "cache é"
    assert ingest(Ingest(root=str(subset), split="val", cache=str(cache))).count() == 2
    (found,) = cache.glob("*/val/pairs.parquet")
    assert pq.read_table(found)["pair_id"].to_pylist() == ["0000001", "0000002"]


@pytest.mark.ray
def test_ingest_one_cache_for_two_data_sets_keeps_them_apart(ray_session, tmp_path):
    configs = []
    for number, name in enumerate(("one", "two"), start=1):
        write_pair(tmp_path / name, number)
        write_tables(tmp_path / name, [subset_line(number)], [])
        root = str(tmp_path / name)
        configs.append(Ingest(root=root, cache=str(tmp_path / "cache")))
    both = [ingest(config) for config in configs]  # lazy: read below, after the second check
    assert [rows.take_all()[0]["pair_id"] for rows in both] == ["0000001", "0000002"]


@pytest.mark.ray
def test_ingest_finished_stream_run_again_writes_nothing(ray_session, subset, tmp_path):
    config = Ingest(root=str(subset), block=2)
    output = str(tmp_path / "out")
    for _ in range(2):
        with engine.resumable(str(tmp_path / "done")):
            ingest(config).write_parquet(output)
        ids = pq.read_table(output)["pair_id"].to_pylist()
        assert sorted(ids) == [f"{n:07d}" for n in (7, 8, 9, 10, 11, 12, 300, 44192)]
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4  # blocks were cut after the read


@pytest.mark.ray
def test_ingest_world_has_a_good_row_for_each_line(ray_session, world_root):
    for split in ("train", "val"):
        rows = ingest(Ingest(root=str(world_root), split=split)).take_all()
        text = (Path(world_root) / f"{split}-19zl.csv").read_text()
        assert len(rows) == len(text.split())
        assert len({row["pair_id"] for row in rows}) == len(rows)
        for row in rows:
            assert row["ground"] and row["aerial"] and row["classes"]
            assert row["error"] is None
            assert -90 < row["latitude"] < 90
