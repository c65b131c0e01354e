import pyarrow as pa
import pytest
from pyarrow import parquet

from cvmatch.data import row_files, tables


@pytest.mark.ray
def test_read_takes_the_union_of_columns_of_the_rows_that_are_counted(ray_session, tmp_path):
    def write(name, **columns):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet.write_table(pa.table(columns), tmp_path / name)

    write("a.parquet", pair_id=["a", None], aerial=[b"1", b"2"])
    write(
        "b.parquet", pair_id=["b", ""], aerial=[b"1", b"2"], latitude=[1.5, 2.5], longitude=[3, 4]
    )
    write("more/c.parquet", pair_id=["c"], aerial=[{"bytes": b"3", "path": "c.png"}],
          latitude=[91.0], longitude=[0.0])  # fmt: skip
    write("_temporary/d.parquet", pair_id=["d"], aerial=[b"4"])
    (tmp_path / "._a.parquet").write_bytes(b"no Parquet")
    columns = ["pair_id", "aerial", "latitude", "longitude", "error"]
    rows = row_files.read(str(tmp_path), columns, needed=["pair_id", "aerial"]).take_all()
    assert len(rows) == tables.count(str(tmp_path)) == 3
    rows.sort(key=lambda row: row["pair_id"])
    errors = [row.pop("error") for row in rows]
    assert rows == [
        {"pair_id": "a", "aerial": b"1", "latitude": None, "longitude": None},
        {"pair_id": "b", "aerial": b"1", "latitude": 1.5, "longitude": 3.0},
        {"pair_id": "c", "aerial": b"3", "latitude": None, "longitude": None},
    ]
    assert errors[:2] == [None, None]
    assert "got 91.0 and 0.0" in errors[2]


def test_read_of_rows_that_no_file_can_serve_says_what_lacks(tmp_path):
    parquet.write_table(pa.table({"pair_id": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"expected columns \['aerial'\], got only \['pair_id'\]"):
        row_files.read(str(tmp_path), ["pair_id", "aerial"], needed=["aerial"])
    parquet.write_table(pa.table({"pair_id": [" "]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="expected rows with a pair_id, got none"):
        row_files.read(str(tmp_path), ["pair_id"])
