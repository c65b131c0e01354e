import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cvmatch.data import schema
from cvmatch.index import update, versions
from cvmatch.index.build import publish
from cvmatch.index.reader import Index
from cvmatch.index.settings import AddTiles, BuildIndex, Compact, DeleteTiles, Vacuum, Verify
from cvmatch.index.update import VacuumResult, compact, delete, join, vacuum
from cvmatch.index.verify import verify
from cvmatch.index.writer import serial_map
from cvmatch.match.model import Matcher
from tests.helpers import index as tiny


def age(output, days=2):
    """Make all files of an index so much older."""
    then = time.time() - days * 86_400
    for path in versions.walk_files(output):
        os.utime(path, (then, then))


def test_added_tiles_are_found_as_if_all_had_been_built_at_once(model, parts, output, tmp_path):
    publish(parts["all"], BuildIndex(model=model, output=output))
    grown = str(tmp_path / "grown")
    publish(parts["first"], BuildIndex(model=model, output=grown))
    info = join(parts["last"], AddTiles(output=grown))
    assert (info.rows, info.version, len(info.ann.parts)) == (24, "v000002", 2)
    whole, pieces = Index.open(output), Index.open(grown, deep=True)
    for mode in ("exact", "two-stage"):
        assert tiny.find_ids(whole, mode) == tiny.find_ids(pieces, mode)
    np.testing.assert_array_equal(
        whole.find_nearest(tiny.queries(), 5), pieces.find_nearest(tiny.queries(), 5)
    )
    assert len(Index.open(grown, version="v000001")) == 16


def test_add_of_tiles_that_are_there_is_refused_and_changes_nothing(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    with pytest.raises(ValueError, match=r"1 of 1 tiles are there already, such as \['0000005'\]"):
        join(parts["again"], AddTiles(output=output))
    assert versions.list_versions(output) == ["v000001"]


def test_many_additions_become_one_piece_again(model, parts, output, monkeypatch):
    monkeypatch.setattr(update, "MAX_ANN_PARTS", 1)
    publish(parts["first"], BuildIndex(model=model, output=output))
    info = join(parts["last"], AddTiles(output=output))
    assert [one.rows for one in info.ann.parts] == [24]
    assert len([name for name in info.files if name.startswith("ann/")]) == 1
    assert len(Index.open(output, deep=True)) == 24


def test_deleted_tiles_are_given_by_no_search_and_may_come_again(model, parts, output):
    publish(parts["all"], BuildIndex(model=model, output=output))
    before = tiny.find_ids(Index.open(output), "exact")
    gone = before[0][0], before[1][0]
    info = delete(DeleteTiles(output=output, ids=gone[:1])).manifest
    delete(DeleteTiles(output=output, ids=gone[1:]))
    assert info.rows == 24
    index = Index.open(output, deep=True)
    for mode in ("exact", "two-stage"):
        assert tiny.find_ids(index, mode) == [[n for n in own if n not in gone] for own in before]
    assert [sorted(row) for row in index.find_nearest(tiny.queries(), 22)] == [
        list(index.live_rows)
    ] * 3
    rows = tiny.rows(24).filter(pc.field(schema.PAIR_ID) == gone[0])
    again = tiny.parts(pa.concat_tables([rows]), model, f"{output}-again")
    join(again, AddTiles(output=output))
    assert gone[0] in tiny.find_ids(Index.open(output), "exact")[0]


def test_shards_of_deleted_tiles_that_are_added_again_live_again(model, parts, output, tmp_path):
    publish(parts["first"], BuildIndex(model=model, output=output), shard_rows=4)
    config = AddTiles(output=output)
    grown = join(parts["last"], config, shard_rows=5)
    before = tiny.find_ids(Index.open(output), "exact")
    last = tuple(f"{number:07d}" for number in range(16, 24))
    delete(DeleteTiles(output=output, ids=("0000003", *last)))
    again = join(parts["last"], config, shard_rows=5)
    assert (again.shards, again.ann) == (grown.shards, grown.ann)
    index = Index.open(output, deep=True)
    assert list(index.deleted) == [3]
    for mode in ("exact", "two-stage"):
        assert tiny.find_ids(index, mode) == [[n for n in own if n != "0000003"] for own in before]

    # Five of them are a shard that is there, the others a new one.
    delete(DeleteTiles(output=output, ids=last))
    rows = tiny.rows(26)
    more = tiny.parts(rows.take([*range(16, 21), 24, 25]), model, str(tmp_path / "more"))
    info = join(more, config, shard_rows=5)
    assert [one.rows for one in info.shards[4:]] == [5, 3, 2]
    index = Index.open(output, deep=True)
    assert list(index.deleted) == [3, 21, 22, 23]
    assert {"0000020", "0000024"} <= set(tiny.find_ids(index, "two-stage")[0])
    compact(Compact(output=output))
    assert verify(Verify(index=output, deep=True)).tiles == 22


def test_delete_reads_one_id_a_line(model, output, tmp_path):
    rows = tiny.rows(6)
    ids = pa.array(["a b", "a", "b", "c", "d", "e"])
    rows = rows.set_column(rows.column_names.index(schema.PAIR_ID), schema.PAIR_ID, ids)
    found = tiny.parts(rows, model, str(tmp_path / "parts"))
    publish(found, BuildIndex(model=model, output=output))
    (tmp_path / "gone.txt").write_bytes(b"a b\r\n\n c \n")
    delete(DeleteTiles(output=output, file=str(tmp_path / "gone.txt")))
    assert Index.open(output).live_ids.to_pylist() == ["a", "b", "d", "e"]


def test_delete_of_ids_of_which_some_are_gone_deletes_the_rest(model, parts, output, caplog):
    caplog.set_level("WARNING", "cvmatch.index.update")
    publish(parts["first"], BuildIndex(model=model, output=output))
    assert delete(DeleteTiles(output=output, ids=("0000003",))).missing == 0
    found = delete(DeleteTiles(output=output, ids=("0000003", "0000004", "x")))
    assert (found.manifest.version, found.missing) == ("v000003", 2)
    assert "2 of 3 ids are not in the index, such as ['0000003', 'x']" in caplog.text
    assert sorted(Index.open(output).deleted) == [3, 4]
    assert versions.read_version(output) == found.manifest


def test_delete_of_nothing_that_is_there_changes_nothing(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    with pytest.raises(ValueError, match=r"got 2, of which none is, such as \['x', 'y'\]"):
        delete(DeleteTiles(output=output, ids=("x", "y")))
    with pytest.raises(ValueError, match=r"--ids or --file\), got 0"):
        delete(DeleteTiles(output=output))
    assert versions.list_versions(output) == ["v000001"]


@pytest.mark.parametrize("shard_rows", [100, 9])
def test_compact_of_a_compact_index_publishes_nothing(model, parts, output, caplog, shard_rows):
    caplog.set_level("INFO", "cvmatch.index.update")
    built = publish(parts["first"], BuildIndex(model=model, output=output), shard_rows=shard_rows)
    assert compact(Compact(output=output)) == built
    assert "v000001 is compact already" in caplog.text
    join(parts["last"], AddTiles(output=output))
    merged = compact(Compact(output=output))
    assert compact(Compact(output=output)) == merged
    delete(DeleteTiles(output=output, ids=("0000023",)))  # the last row: the others stay in order
    assert compact(Compact(output=output)).rows == 23
    assert versions.list_versions(output)[-1] == "v000005"


def test_vacuum_of_nothing_removes_nothing(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    assert vacuum(Vacuum(output=output)) == VacuumResult(versions=0, files=0, bytes=0)
    assert len(Index.open(output, deep=True)) == 16


def test_compacted_index_has_the_shards_of_one_that_was_built_at_once(
    model, parts, output, tmp_path
):
    rows = tiny.rows(24)
    left = [number for number in range(24) if number not in (2, 20)]
    kept = tiny.parts(rows.take(left), model, str(tmp_path / "kept"))
    fresh = publish(kept, BuildIndex(model=model, output=str(tmp_path / "fresh")), shard_rows=9)
    publish(parts["last"], BuildIndex(model=model, output=output), shard_rows=9)
    join(parts["first"], AddTiles(output=output))
    delete(DeleteTiles(output=output, ids=("0000002", "0000020")))
    info = compact(Compact(output=output))
    assert info.shards == fresh.shards
    assert info.ann.parts == fresh.ann.parts  # vectors as they are need no training
    assert verify(Verify(index=output, deep=True)).tiles == 22


def test_vacuum_removes_what_only_old_versions_need(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    join(parts["last"], AddTiles(output=output))
    compact(Compact(output=output))
    reader = Index.open(output, version="v000001")
    age(output)
    gone = vacuum(Vacuum(output=output, keep=1))
    assert gone.versions == 2
    assert gone.bytes > 0
    assert len(Index.open(output, deep=True)) == 24
    assert tiny.find_ids(reader, "exact")[0]  # goes on with what it opened
    with pytest.raises(FileNotFoundError, match="v000001, found"):
        Index.open(output, version="v000001")


def test_vacuum_during_a_publication_leaves_the_files_that_it_put_into_place(
    model, parts, output, tmp_path
):
    publish(parts["last"], BuildIndex(model=model, output=output))
    publish(parts["first"], BuildIndex(model=model, output=output))
    unused = os.path.join(output, "shards", "unused")
    versions.write_file(unused, b"of a publication that was killed")
    age(output)
    removed = []

    def run(function, tasks):
        done = serial_map(function, tasks)
        removed.append(vacuum(Vacuum(output=output, keep=1)).files)
        return done

    # It takes the old shards of the version that goes again, and copies old files of a model.
    net = Matcher.load(model)
    net.get_parameter("heads.query.direct.0.weight").data += 1
    net.save(str(tmp_path / "other"))
    age(str(tmp_path / "other"))
    publish(parts["last"], BuildIndex(model=str(tmp_path / "other"), output=output), run)
    assert not os.path.exists(unused)
    assert removed[0] > 1
    assert len(Index.open(output, deep=True)) == 8


def test_build_whose_older_shards_are_removed_meanwhile_is_not_published(model, parts, output):
    config = BuildIndex(model=model, output=output)
    old = publish(parts["last"], config)
    publish(parts["first"], config)
    age(output)

    def run(function, tasks):
        done = serial_map(function, tasks)
        vacuum(Vacuum(output=output, keep=1))
        return done

    with pytest.raises(FileNotFoundError, match=r"shards/.* was removed .* Run it again"):
        publish("", config, run, known=old)
    assert len(Index.open(output, deep=True)) == 16


def test_delete_during_an_addition_is_not_lost(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))

    def run(function, tasks):
        if versions.current_version(output) == "v000001":
            delete(DeleteTiles(output=output, ids=("0000003",)))
        return serial_map(function, tasks)

    with pytest.raises(ValueError, match=r"of version v000001, but v000002 is .* Run it again"):
        join(parts["last"], AddTiles(output=output), run)
    index = Index.open(output)
    assert (index.manifest.version, list(index.deleted)) == ("v000002", [3])
    info = join(parts["last"], AddTiles(output=output))
    assert (info.parent, list(Index.open(output).deleted)) == ("v000002", [3])


def test_tiles_of_another_tower_than_the_current_version_has_are_refused(model, parts, output):
    tower = publish(parts["first"], BuildIndex(model=model, output=output)).tower
    with pytest.raises(ValueError, match=r"by the tower 0123.*, but v000001 was built"):
        join(parts["last"], AddTiles(output=output), tower="0123")
    assert versions.list_versions(output) == ["v000001"]
    assert join(parts["last"], AddTiles(output=output), tower=tower).rows == 24


@pytest.mark.ray
def test_addition_that_was_refused_goes_on_with_what_it_embedded(
    ray_session, model, parts, output, tmp_path
):
    publish(parts["first"], BuildIndex(model=model, output=output))
    config = AddTiles(output=output, rows=tiny.write(tiny.rows(24).slice(15), str(tmp_path / "r")))
    with pytest.raises(ValueError, match="1 of 9 tiles are there already"):
        update.add(config)
    delete(DeleteTiles(output=output, ids=("0000015",)))
    update.add(config)
    assert len(Index.open(output, deep=True).live_rows) == 24
    assert os.listdir(os.path.join(output, "building")) == []  # there was no second one
