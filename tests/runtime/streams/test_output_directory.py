"""Rows and failed rows of the files of a stream, while it writes them and afterwards."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cvmatch.data import schema
from cvmatch.runtime.streams.output_directory import FailureRateGuard, OutputDirectory


def part(output: Path, name: str, errors: list[str | None], ids: list[str] | None = None) -> Path:
    ids = ids or [f"{name}-{row}" for row in range(len(errors))]
    table = schema.conform(pa.table({"pair_id": ids, "error": pa.array(errors, pa.string())}))
    pq.write_table(table, output / f"{name}.parquet")
    return output / f"{name}.parquet"


def test_output_directory_counts_the_files_and_names_the_failed_rows(tmp_path):
    part(tmp_path, "a", [None, "no picture"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    part(tmp_path, "b", [None, None, None])
    (tmp_path / "manifest.json").write_text("{}")
    directory.refresh()
    assert directory.rows == 5
    assert directory.failed == [{"pair_id": "a-1", "reason": "no picture"}]
    location = directory.write_rejected()
    assert json.loads(Path(location).read_text()) == {"pair_id": "a-1", "reason": "no picture"}


def test_output_directory_leaves_out_a_part_that_is_being_written(tmp_path):
    part(tmp_path, "a", [None])
    whole = part(tmp_path, "b", [None, None]).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-100])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh(running=True)
    assert directory.rows == 1
    with pytest.raises(pa.ArrowInvalid):
        directory.refresh()
    (tmp_path / "b.parquet").write_bytes(whole)
    directory.refresh(running=True)
    assert directory.rows == 3


def test_output_directory_forgets_a_part_that_a_resumed_stream_deleted(tmp_path):
    part(tmp_path, "a", [None])
    gone = part(tmp_path, "b", ["no picture"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    gone.unlink()
    directory.refresh()
    assert (directory.rows, directory.failed) == (1, [])


def test_output_directory_compares_the_share_of_all_rows_not_of_those_so_far(tmp_path):
    part(tmp_path, "a", [None, "no picture", "too large"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    directory.check_failure_rate(total=40, max_share=0.05)  # 2 of 40
    with pytest.raises(ValueError, match=r"at most 5% of 30 rows to fail, got 2 among the first 3"):
        directory.check_failure_rate(total=30, max_share=0.05)
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 2


def test_output_directory_requires_each_row_once(tmp_path):
    part(tmp_path, "a", [None, "no picture"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    directory.check_complete(2)
    part(tmp_path, "b", [None])
    directory.refresh()
    for total in (2, 4):
        with pytest.raises(ValueError, match=rf"expected {total} rows, got 3: .* twice, or lack"):
            directory.check_complete(total)


def test_output_directory_refuses_a_row_twice_where_another_one_lacks(tmp_path):
    part(tmp_path, "a", [None, "no picture"], ["0000001", "0000002"])
    part(tmp_path, "b", [None, None], ["0000002", "0000004"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    with pytest.raises(ValueError, match=r"expected 4 rows, got 4: of 3 ids, .*\['0000002'\]"):
        directory.check_complete(4)


def test_rows_that_a_killed_run_wrote_late_are_dropped_and_a_good_one_is_kept(tmp_path):
    part(tmp_path, "old_1", [None, "no answer", None], ["1", "2", "3"])
    part(tmp_path, "new_1", [None, None], ["2", "3"])
    part(tmp_path, "new_2", [None], ["4"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    assert directory.drop_copies() == 2
    directory.check_complete(4)
    assert not directory.failed
    assert directory.drop_copies() == 0


def test_rows_that_one_run_wrote_twice_are_not_dropped(tmp_path):
    part(tmp_path, "run_1", [None, None], ["1", "2"])
    part(tmp_path, "run_2", [None], ["2"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    assert directory.drop_copies() == 0
    with pytest.raises(ValueError, match=r"\['2'\]"):
        directory.check_complete(3)


def test_output_directory_requires_a_good_row(tmp_path):
    part(tmp_path, "a", ["no picture", "too large"])
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    directory.check_failure_rate(total=2, max_share=1.0)
    with pytest.raises(ValueError, match=r"all 2 failed, .*'no picture'.*rejected\.jsonl"):
        directory.check_any_good()
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 2
    part(tmp_path, "b", [None])
    directory.refresh()
    directory.check_any_good()


def test_failure_rate_guard_ends_a_stream_with_too_many_failed_rows(tmp_path):
    directory = OutputDirectory(str(tmp_path))
    guard = FailureRateGuard(directory, total=30, max_share=0.05)
    guard(None)
    part(tmp_path, "a", ["no picture"] * 2)
    guard.next = 0.0  # the time has come to look again, in a thread
    guard(None)
    while directory.rows < 2:
        time.sleep(0.01)
    guard.next = 0.0
    with pytest.raises(ValueError, match="no picture"):
        guard(None)
