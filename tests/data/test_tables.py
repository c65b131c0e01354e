import pyarrow as pa
import pytest
from pyarrow import parquet

from cvmatch.data import schema, tables


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def test_files_are_those_of_folders_below_and_none_that_is_hidden(tmp_path):
    for name in ("b.parquet", "more/a.PARQUET", "_temporary/0/x.parquet", ".trash/x.parquet"):
        write(tmp_path / name, pair_id=["1", "2"])
    (tmp_path / "._b.parquet").write_bytes(b"\0\5\x16\7 Mac OS X")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    assert tables.files(str(tmp_path)) == ["b.parquet", "more/a.PARQUET"]
    assert tables.count(str(tmp_path)) == sum(tables.rows(str(tmp_path))) == 4
    assert [name for name, _ in tables.sizes(str(tmp_path))] == ["b.parquet", "more/a.PARQUET"]


def test_files_only_in_folders_below_are_found(tmp_path):
    write(tmp_path / "rows" / "part" / "a.parquet", pair_id=["1"])
    (batch,) = tables.batches(str(tmp_path / "rows"), ["pair_id"])
    assert batch.to_pylist() == [{"pair_id": "1"}]


def test_inspect_of_what_is_no_parquet_names_the_file(tmp_path):
    write(tmp_path / "a.parquet", pair_id=["1"])
    (tmp_path / "b.parquet").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"b\.parquet: expected a Parquet file"):
        tables.inspect(str(tmp_path))


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_without_an_id_are_named_and_not_counted(tmp_path, statistics):
    ids = ["a", None, "", " \t", "b", " c"]
    rows = pa.table({"pair_id": ids})
    parquet.write_table(rows, tmp_path / "a.parquet", write_statistics=statistics)
    write(tmp_path / "b.parquet", pair_id=pa.array(["d", "e"]).dictionary_encode())
    write(tmp_path / "c.parquet", pair_id=[7, 8])
    write(tmp_path / "d.parquet", aerial=[b""])
    assert tables.count(str(tmp_path)) == 3 + 2 + 2
    named = tables.find_nameless(str(tmp_path))
    assert [str(row["error"]).split(":")[0] for row in named] == [
        "a.parquet row 1", "a.parquet row 2", "a.parquet row 3", "d.parquet row 0",
    ]  # fmt: skip


def test_batches_of_pictures_as_hugging_face_stores_them_are_bytes(tmp_path):
    write(tmp_path / "a.parquet", pair_id=["1"], aerial=[{"bytes": b"PNG", "path": "a.png"}])
    write(tmp_path / "b.parquet", pair_id=["2"], latitude=[float("nan")])
    rows = [
        row
        for table in tables.batches(str(tmp_path), ["pair_id", "aerial", "latitude"])
        for row in table.to_pylist()
    ]
    assert rows == [
        {"pair_id": "1", "aerial": b"PNG", "latitude": None},
        {"pair_id": "2", "aerial": None, "latitude": None},
    ]


def test_reject_unusable_positions_have_a_reason_and_are_gone():
    nan, inf = float("nan"), float("inf")
    places = [(46.9, 7.4), (-122.4, 37.8), (inf, 0), (0, -inf), (nan, nan), (1, nan), (90, -180)]
    table = pa.table(
        {
            "pair_id": [str(i) for i in range(len(places))],
            "latitude": [float(place[0]) for place in places],
            "longitude": [float(place[1]) for place in places],
        }
    )
    checked = schema.reject_unusable(schema.conform(table))
    places = zip(checked["latitude"].to_pylist(), checked["longitude"].to_pylist(), strict=True)
    assert [*places] == [(46.9, 7.4), (None, None), (None, None), (None, None), (None, None),
                    (None, None), (90.0, -180.0)]  # fmt: skip
    bad = [i for i, error in enumerate(checked["error"].to_pylist()) if error]
    assert bad == [1, 2, 3, 5]
    assert "got -122.4 and 37.8" in checked["error"][1].as_py()


def test_reject_unusable_keeps_the_reason_that_a_row_had():
    table = pa.table({"pair_id": ["a", " "], "latitude": [91.0, 1], "longitude": [0.0, 1],
                      "error": ["no such file", None]})  # fmt: skip
    (row,) = schema.reject_unusable(schema.conform(table)).to_pylist()
    assert (row["pair_id"], row["error"], row["latitude"]) == ("a", "no such file", None)
