import json
import os
import shutil
import zlib
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cvmatch.data import schema
from cvmatch.data.pairs import PairDataset, check_pictures, read_pictures
from cvmatch.data.settings import Ingest, Validation
from cvmatch.generate.settings import TrainGenerator
from cvmatch.runtime.streams.write import resume_from
from cvmatch.segment.settings import TrainSegmenter
from tests.helpers.cvusa import colour_of, picture, put, subset_line, write_pair, write_tables


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
        (b"\0\5\x16\7 Mac OS X", "not a PNG, JPEG"),
        (picture(mode="I;16"), "grey of 16 bits"),
        (picture(kind="TIFF"), "not a PNG, JPEG"),
        (bomb(), "10000000000 pixels"),
    ],
    ids=["gone", "empty", "cut", "mac", "dark", "tiff", "bomb"],
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
    (row,) = read_pictures(rows, str(tmp_path), ["aerial"]).to_pylist()
    assert row["aerial"] == picture()
    assert row["error"] is None
    assert "ground" not in row


@pytest.mark.parametrize("wrong", [{"block": 0}, {"limit": -1}, {"max_rejected": 1.5}])
def test_pair_dataset_config_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected block >= 1"):
        Ingest(**wrong)


def test_pair_dataset_missing_split_names_the_file(subset):
    (subset / "val-19zl.csv").unlink()
    with pytest.raises(ValueError, match=r"expected val-19zl\.csv beside.*train-19zl\.csv"):
        PairDataset.open(Ingest(root=str(subset), split="val"))


@pytest.mark.ray
def test_pair_dataset_subset_gives_each_id_its_own_pictures(ray_session, subset):
    rows = PairDataset.open(Ingest(root=str(subset.parents[1]), block=3)).rows().take_all()
    assert {row["pair_id"] for row in rows} == {
        f"{n:07d}" for n in (7, 8, 9, 10, 11, 12, 300, 44192)
    }
    for row in rows:
        number = int(row["pair_id"])
        assert row["aerial"] == picture(colour_of(number))
        assert row["ground"] == picture(colour_of(number), kind="JPEG")
        assert (row["classes"] is None) == (number == 12)
        assert row["error"] is None
    assert PairDataset.open(Ingest(root=str(subset))).rejected == []


@pytest.mark.ray
def test_pair_dataset_uri_with_space_percent_and_accent_reads_as_the_path_does(ray_session, subset):
    config = Ingest(root="file://" + quote(str(subset)), split="val")
    rows = PairDataset.open(config).rows().take_all()
    assert sorted(row["pair_id"] for row in rows) == ["0000001", "0000002"]
    assert all(row["ground"] and not row["error"] for row in rows)


@pytest.mark.ray
def test_pair_dataset_official_with_limit_takes_the_first_lines(ray_session, official):
    rows = PairDataset.open(Ingest(root=str(official), limit=2)).rows().take_all()
    places = {row["pair_id"]: (row["latitude"], row["longitude"]) for row in rows}
    assert places == {"0000003": (32.5, -102.25), "0000001": (30.5, -100.25)}
    assert len(PairDataset.open(Ingest(root=str(official))).rows().take_all()) == 3


@pytest.mark.ray
def test_fingerprint_changes_with_rows_positions_and_pictures(ray_session, official):
    config = Ingest(root=str(official))
    found = [PairDataset.open(config).fingerprint]
    assert PairDataset.open(config).fingerprint == found[0]
    places = official / "split_locations" / "all.csv"
    places.write_text(places.read_text().replace("30.5", "40.5"))
    found.append(PairDataset.open(config).fingerprint)
    put(official / "bingmap/19/0000003.jpg", picture(kind="JPEG", size=(64, 64)))
    found.append(PairDataset.open(config).fingerprint)
    table = official / "splits" / "train-19zl.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
    found.append(PairDataset.open(config).fingerprint)
    assert len(set(found)) == len(found)


@pytest.mark.ray
def test_pair_dataset_too_many_bad_rows_stops_and_names_them_until_mended(ray_session, subset):
    tile = subset / "bingmap/input0000009.png"
    tile.write_bytes(tile.read_bytes()[:40])
    (subset / "streetview/0000010.jpg").unlink()
    config = Ingest(root=str(subset))
    with pytest.raises(ValueError, match=r"25\.0% \(2\).*rejected\.jsonl.*ends in \.max-rejected"):
        PairDataset.open(config)
    tolerant = PairDataset.open(Ingest(root=str(subset), max_rejected=0.25))
    named = {row["pair_id"]: row["file"] for row in tolerant.rejected}
    assert named == {
        "0000009": "bingmap/input0000009.png",
        "0000010": "streetview/input0000010.jpg",
    }
    lines = (subset / ".cvmatch/train/rejected.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"pair_id", "file", "reason"}] * 2

    rows = tolerant.rows().take_all()
    assert {row["pair_id"] for row in rows}.isdisjoint(named)
    assert len(rows) == 6

    write_pair(subset, 9)
    assert PairDataset.open(tolerant.config).count == 7  # its size or time is another one
    write_pair(subset, 10)
    assert PairDataset.open(config).count == 8  # looked at again without being told to


@pytest.mark.ray
def test_pair_dataset_no_usable_row_stops_whatever_share_is_allowed(ray_session, tmp_path):
    write_tables(tmp_path, [subset_line(1)], [subset_line(9)])
    with pytest.raises(ValueError, match=r"usable rows, got none.*no such file"):
        PairDataset.open(Ingest(root=str(tmp_path), max_rejected=1.0))


@pytest.mark.ray
def test_pair_dataset_second_run_trusts_the_check_until_its_cache_is_deleted(ray_session, subset):
    config = Ingest(root=str(subset), split="val", max_rejected=0.5)
    assert PairDataset.open(config).count == 2
    stamp = os.stat(subset / ".cvmatch/val/pairs.parquet").st_mtime_ns
    (subset / "streetview/0000002.jpg").unlink()

    rows = {row["pair_id"]: row for row in PairDataset.open(config).rows().take_all()}
    assert os.stat(subset / ".cvmatch/val/pairs.parquet").st_mtime_ns == stamp
    assert rows["0000002"]["error"] == "ground streetview/0000002.jpg: no such file"
    assert rows["0000001"]["error"] is None

    shutil.rmtree(subset / ".cvmatch")
    assert [row["pair_id"] for row in PairDataset.open(config).rows().take_all()] == ["0000001"]


@pytest.mark.parametrize("stage", [TrainSegmenter, TrainGenerator])
def test_training_validated_by_its_own_rows_is_refused(stage):
    data = Ingest(root="pairs")
    for root, limit in (("pairs", 0), ("./pairs", 5)):
        own = Validation(root=root, split="train", limit=limit)
        with pytest.raises(ValueError, match=r"split 'train' of .*pairs for both.*--val.split"):
            stage(data=data, val=own)
    for other in (Validation(root="pairs"), Validation(root="others", split="train")):
        assert stage(data=data, val=other).val == other
    with pytest.raises(ValueError, match=r"split .val. of .*pairs for both"):
        TrainSegmenter(data=Ingest(root="pairs", split="val"))  # its schedule looks at that split


@pytest.mark.ray
def test_pair_dataset_changed_table_is_checked_again(ray_session, subset):
    config = Ingest(root=str(subset), split="val")
    assert PairDataset.open(config).count == 2
    write_pair(subset, 3)
    lines = "".join(f"{subset_line(n)}\r\n" for n in (1, 2, 3))
    (subset / "val-19zl.csv").write_text(lines)
    assert PairDataset.open(config).count == 3


@pytest.mark.ray
def test_pair_dataset_root_that_takes_no_files_asks_for_a_cache(ray_session, subset, tmp_path):
    put(subset / ".cvmatch", b"a file where the directory would be")
    with pytest.raises(ValueError, match=r"read-only, pass a directory with .* ends in \.cache"):
        PairDataset.open(Ingest(root=str(subset), split="val"))
    cache = tmp_path / "cache é"
    elsewhere = Ingest(root=str(subset), split="val", cache=str(cache))
    assert PairDataset.open(elsewhere).count == 2
    (found,) = cache.glob("*/val/pairs.parquet")
    assert pq.read_table(found)["pair_id"].to_pylist() == ["0000001", "0000002"]


@pytest.mark.ray
def test_pair_dataset_one_cache_for_two_data_sets_keeps_them_apart(ray_session, tmp_path):
    configs = []
    for number, name in enumerate(("one", "two"), start=1):
        write_pair(tmp_path / name, number)
        write_tables(tmp_path / name, [subset_line(number)], [subset_line(9)])
        root = str(tmp_path / name)
        configs.append(Ingest(root=root, cache=str(tmp_path / "cache")))
    # Lazy: they are read below, after the second check.
    both = [PairDataset.open(config).rows() for config in configs]
    assert [rows.take_all()[0]["pair_id"] for rows in both] == ["0000001", "0000002"]


@pytest.mark.ray
def test_pair_dataset_finished_stream_run_again_writes_nothing(ray_session, subset, tmp_path):
    config = Ingest(root=str(subset), block=2)
    output = str(tmp_path / "out")
    for _ in range(2):
        with resume_from(str(tmp_path / "done")):
            PairDataset.open(config).rows().write_parquet(output)
        ids = pq.read_table(output)["pair_id"].to_pylist()
        assert sorted(ids) == [f"{n:07d}" for n in (7, 8, 9, 10, 11, 12, 300, 44192)]
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4  # blocks were cut after the read


@pytest.mark.ray
def test_pair_dataset_world_has_a_good_row_for_each_line(ray_session, world_root):
    for split in ("train", "val"):
        rows = PairDataset.open(Ingest(root=str(world_root), split=split)).rows().take_all()
        text = (Path(world_root) / f"{split}-19zl.csv").read_text()
        assert len(rows) == len(text.split())
        assert len({row["pair_id"] for row in rows}) == len(rows)
        for row in rows:
            assert all(row[name] for name in ("ground", "aerial", "classes"))
            assert row["error"] is None
            assert -90 < row["latitude"] < 90
