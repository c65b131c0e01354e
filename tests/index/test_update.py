import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch

from cvmatch.data import schema
from cvmatch.index import ann, remote, update, versions
from cvmatch.index.build import publish
from cvmatch.index.ranking import rank
from cvmatch.index.reader import Index
from cvmatch.index.settings import AddTiles, BuildIndex, Compact, DeleteTiles, Vacuum, Verify
from cvmatch.index.update import compact, delete, join
from cvmatch.index.verify import probes_of, verify
from cvmatch.index.writer import serially
from cvmatch.match.fusion import Query
from cvmatch.match.model import Matcher, fingerprint_parts
from tests.helpers import index as tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.matcher(str(tmp_path_factory.mktemp("matcher")))


@pytest.fixture(scope="module")
def parts(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("parts")
    rows = tiny.rows(24)
    ranges = {"all": (0, 24), "first": (0, 16), "last": (16, 8), "again": (5, 1)}
    return {
        name: tiny.parts(rows.slice(at, count), model, str(place / name))
        for name, (at, count) in ranges.items()
    }


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "index")


def queries(count=3):
    random = torch.Generator().manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(count, 16, generator=random), dim=1)
    return Query(embedding, torch.randn(count, 16, generator=random))


def ids_found(index, mode, top_k=24):
    rows = rank(index, queries(), top_k, mode).rows
    names = index.tiles[schema.PAIR_ID].to_pylist()
    return [[names[row] for row in own if row >= 0] for own in rows]


def test_shards_of_any_size_hold_the_same_tiles_and_give_the_same_answers(
    model, parts, output, tmp_path
):
    publish(parts["all"], BuildIndex(model=model, output=output))
    many = str(tmp_path / "many")
    info = publish(parts["all"], BuildIndex(model=model, output=many, shard_rows=7))
    assert [one["rows"] for one in info["shards"]] == [7, 7, 7, 3]
    one, other = Index.open(output), Index.open(many, deep=True)
    assert one.tiles[schema.PAIR_ID].to_pylist() == other.tiles[schema.PAIR_ID].to_pylist()
    rows = np.array([23, 0, 6, 7, 20])
    np.testing.assert_array_equal(one.tile_proj.take(rows), other.tile_proj.take(rows))
    for mode in ("exact", "two-stage"):
        assert ids_found(one, mode) == ids_found(other, mode)


@pytest.mark.parametrize("key", ["Flat", "PQ8x4", "IVF4,PQ8x4", "SQ8"])
def test_codes_merged_from_shards_are_the_bytes_of_one_shard(key):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    template = ann.template(key, vectors)
    pieces = [ann.encoded(template, [vectors[a:b]]) for a, b in ((0, 90), (90, 91), (91, 300))]
    whole = ann.encoded(template, [vectors[:150], vectors[150:]])
    merged, single = (
        faiss.serialize_index(ann.merged(template, codes)) for codes in (pieces, [whole])
    )
    np.testing.assert_array_equal(merged, single)


@pytest.mark.parametrize("key", ["PQ8x4", "IVF4,PQ8x4"])
def test_codes_of_another_template_are_refused(key):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    template, other = ann.template(key, vectors), ann.template(key, vectors[::-1] + 1)
    codes = [ann.encoded(template, [vectors]), ann.encoded(other, [vectors])]
    with pytest.raises(ValueError, match="codes of shard 1 were not made by the template"):
        ann.merged(template, codes)


@pytest.mark.parametrize("key", ["PQ8x4fs", "IVF4,PQ8x4fs", "HNSW32", "PQ8x4,Refine(SQfp16)"])
def test_kinds_whose_shards_cannot_be_merged_are_refused(key):
    with pytest.raises(ValueError, match=r"cannot be merged.*--key auto"):
        ann.template(key, np.ones((64, 16), np.float32))


def test_added_tiles_are_found_as_if_all_had_been_built_at_once(model, parts, output, tmp_path):
    publish(parts["all"], BuildIndex(model=model, output=output))
    grown = str(tmp_path / "grown")
    publish(parts["first"], BuildIndex(model=model, output=grown))
    info = join(parts["last"], AddTiles(output=grown))
    assert (info["rows"], info["version"], len(info["ann"]["parts"])) == (24, "v000002", 2)
    whole, pieces = Index.open(output), Index.open(grown, deep=True)
    for mode in ("exact", "two-stage"):
        assert ids_found(whole, mode) == ids_found(pieces, mode)
    np.testing.assert_array_equal(whole.nearest(queries(), 5), pieces.nearest(queries(), 5))
    assert len(Index.open(grown, version="v000001")) == 16


def test_add_of_tiles_that_are_there_is_refused_and_changes_nothing(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    with pytest.raises(ValueError, match=r"1 of 1 tiles are there already, such as \['0000005'\]"):
        join(parts["again"], AddTiles(output=output))
    assert versions.names(output) == ["v000001"]


def test_many_additions_become_one_piece_again(model, parts, output, monkeypatch):
    monkeypatch.setattr(update, "PIECES", 1)
    publish(parts["first"], BuildIndex(model=model, output=output))
    info = join(parts["last"], AddTiles(output=output))
    assert [one["rows"] for one in info["ann"]["parts"]] == [24]
    assert len([name for name in info["files"] if name.startswith("ann/")]) == 1
    assert len(Index.open(output, deep=True)) == 24


def test_deleted_tiles_are_given_by_no_search_and_may_come_again(model, parts, output):
    publish(parts["all"], BuildIndex(model=model, output=output))
    before = ids_found(Index.open(output), "exact")
    gone = before[0][0], before[1][0]
    info = delete(DeleteTiles(output=output, ids=gone[:1]))
    delete(DeleteTiles(output=output, ids=gone[1:]))
    assert info["rows"] == 24
    index = Index.open(output, deep=True)
    for mode in ("exact", "two-stage"):
        assert ids_found(index, mode) == [[n for n in own if n not in gone] for own in before]
    assert [sorted(row) for row in index.nearest(queries(), 22)] == [list(index.living)] * 3
    rows = tiny.rows(24).filter(pa.compute.field(schema.PAIR_ID) == gone[0])
    again = tiny.parts(pa.concat_tables([rows]), model, f"{output}-again")
    join(again, AddTiles(output=output))
    assert gone[0] in ids_found(Index.open(output), "exact")[0]


def test_shards_of_deleted_tiles_that_are_added_again_live_again(model, parts, output, tmp_path):
    publish(parts["first"], BuildIndex(model=model, output=output, shard_rows=4))
    config = AddTiles(output=output, shard_rows=5)
    grown = join(parts["last"], config)
    before = ids_found(Index.open(output), "exact")
    last = tuple(f"{number:07d}" for number in range(16, 24))
    delete(DeleteTiles(output=output, ids=("0000003", *last)))
    again = join(parts["last"], config)
    assert (again["shards"], again["ann"]) == (grown["shards"], grown["ann"])
    index = Index.open(output, deep=True)
    assert list(index.dead) == [3]
    for mode in ("exact", "two-stage"):
        assert ids_found(index, mode) == [[n for n in own if n != "0000003"] for own in before]

    # Five of them are a shard that is there, the others a new one.
    delete(DeleteTiles(output=output, ids=last))
    rows = tiny.rows(26)
    more = tiny.parts(rows.take([*range(16, 21), 24, 25]), model, str(tmp_path / "more"))
    info = join(more, config)
    assert [one["rows"] for one in info["shards"][4:]] == [5, 3, 2]
    index = Index.open(output, deep=True)
    assert list(index.dead) == [3, 21, 22, 23]
    assert {"0000020", "0000024"} <= set(ids_found(index, "two-stage")[0])
    compact(Compact(output=output))
    assert verify(Verify(index=output, deep=True))["tiles"] == 22


def test_shortlist_is_full_although_the_nearest_tiles_were_deleted(model, parts, output):
    publish(parts["all"], BuildIndex(model=model, output=output, shortlist=4))
    index = Index.open(output)
    near = index.nearest(queries(1), 24)[0]
    names = index.tiles[schema.PAIR_ID].take(pa.array(near)).to_pylist()
    delete(DeleteTiles(output=output, ids=tuple(names[:9])))
    index = Index.open(output)
    np.testing.assert_array_equal(index.nearest(queries(1)), [near[9:13]])
    assert (index.nearest(queries()) >= 0).all()
    # Fewer than asked are left: all of them, and nothing behind.
    np.testing.assert_array_equal(index.nearest(queries(1), 20), [[*near[9:], *[-1] * 5]])


def test_shortlist_of_lists_that_hold_few_living_tiles_ends(model, parts, output):
    key = {"key": "IVF4,Flat", "probes": 1, "shortlist": 6}
    publish(parts["all"], BuildIndex(model=model, output=output, **key))
    whole = Index.open(output).nearest(queries(), 24)
    delete(DeleteTiles(output=output, ids=tuple(f"{number:07d}" for number in range(20))))
    living = [[row for row in own if row >= 20] for own in whole]
    found = Index.open(output).nearest(queries(), 6)
    assert [[row for row in own if row >= 0] for own in found] == living


def test_delete_reads_one_id_a_line(model, output, tmp_path):
    rows = tiny.rows(6)
    ids = pa.array(["a b", "a", "b", "c", "d", "e"])
    rows = rows.set_column(rows.column_names.index(schema.PAIR_ID), schema.PAIR_ID, ids)
    found = tiny.parts(rows, model, str(tmp_path / "parts"))
    publish(found, BuildIndex(model=model, output=output))
    (tmp_path / "gone.txt").write_bytes(b"a b\r\n\n c \n")
    delete(DeleteTiles(output=output, file=str(tmp_path / "gone.txt")))
    assert Index.open(output).living_ids.to_pylist() == ["a", "b", "d", "e"]


def test_delete_of_ids_of_which_some_are_gone_deletes_the_rest(model, parts, output, caplog):
    publish(parts["first"], BuildIndex(model=model, output=output))
    assert delete(DeleteTiles(output=output, ids=("0000003",)))["missing"] == 0
    found = delete(DeleteTiles(output=output, ids=("0000003", "0000004", "x")))
    assert (found["version"], found["missing"]) == ("v000003", 2)
    assert "2 of 3 ids are not in the index, such as ['0000003', 'x']" in caplog.text
    assert sorted(Index.open(output).dead) == [3, 4]
    assert "missing" not in versions.read(output)


def test_delete_of_nothing_that_is_there_changes_nothing(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    with pytest.raises(ValueError, match=r"got 2, of which none is, such as \['x', 'y'\]"):
        delete(DeleteTiles(output=output, ids=("x", "y")))
    with pytest.raises(ValueError, match=r"--ids or --file\), got 0"):
        delete(DeleteTiles(output=output))
    assert versions.names(output) == ["v000001"]


@pytest.mark.parametrize("shard_rows", [100, 9])
def test_compact_of_a_compact_index_publishes_nothing(model, parts, output, caplog, shard_rows):
    caplog.set_level("INFO", "cvmatch.index.update")
    built = publish(parts["first"], BuildIndex(model=model, output=output, shard_rows=shard_rows))
    assert compact(Compact(output=output)) == built
    assert "v000001 is compact already" in caplog.text
    join(parts["last"], AddTiles(output=output))
    merged = compact(Compact(output=output))
    assert compact(Compact(output=output)) == merged
    delete(DeleteTiles(output=output, ids=("0000023",)))  # the last row: the others stay in order
    assert compact(Compact(output=output))["rows"] == 23
    assert versions.names(output)[-1] == "v000005"


def test_vacuum_of_nothing_removes_nothing(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    assert update.vacuum(Vacuum(output=output)) == {"versions": 0, "files": 0, "bytes": 0}
    assert len(Index.open(output, deep=True)) == 16


def test_compacted_index_has_the_shards_of_one_that_was_built_at_once(
    model, parts, output, tmp_path
):
    rows = tiny.rows(24)
    left = [number for number in range(24) if number not in (2, 20)]
    kept = tiny.parts(rows.take(left), model, str(tmp_path / "kept"))
    fresh = publish(kept, BuildIndex(model=model, output=str(tmp_path / "fresh"), shard_rows=9))
    publish(parts["last"], BuildIndex(model=model, output=output, shard_rows=9))
    join(parts["first"], AddTiles(output=output))
    delete(DeleteTiles(output=output, ids=("0000002", "0000020")))
    info = compact(Compact(output=output))
    same = ("sha", "rows", "row_start", "codes")
    assert [[one[name] for name in same] for one in info["shards"]] == [
        [one[name] for name in same] for one in fresh["shards"]
    ]
    assert info["ann"]["parts"] == fresh["ann"]["parts"]  # vectors as they are need no training
    assert verify(Verify(index=output, deep=True))["tiles"] == 22


def test_vacuum_removes_what_only_old_versions_need(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))
    join(parts["last"], AddTiles(output=output))
    compact(Compact(output=output))
    reader = Index.open(output, version="v000001")
    age(output)
    gone = update.vacuum(Vacuum(output=output, keep=1))
    assert gone["versions"] == 2
    assert gone["bytes"] > 0
    assert len(Index.open(output, deep=True)) == 24
    assert ids_found(reader, "exact")[0]  # goes on with what it opened
    with pytest.raises(FileNotFoundError, match="v000001, found"):
        Index.open(output, version="v000001")


def test_vacuum_during_a_publication_leaves_the_files_that_it_put_into_place(
    model, parts, output, tmp_path
):
    publish(parts["last"], BuildIndex(model=model, output=output))
    publish(parts["first"], BuildIndex(model=model, output=output))
    unused = os.path.join(output, "shards", "unused")
    versions.write(unused, b"of a publication that was killed")
    age(output)
    removed = []

    def run(function, tasks):
        done = serially(function, tasks)
        removed.append(update.vacuum(Vacuum(output=output, keep=1))["files"])
        return done

    # It takes the old shards of the version that goes again, and copies old files of a model.
    net = Matcher.load(model)
    net.candidate_mlp.last.weight.data += 1
    net.save(str(tmp_path / "other"))
    age(str(tmp_path / "other"))
    publish(parts["last"], BuildIndex(model=str(tmp_path / "other"), output=output), run)
    assert not os.path.exists(unused)
    assert removed[0] > 1
    assert len(Index.open(output, deep=True)) == 8


def test_build_whose_older_shards_are_collected_meanwhile_is_not_published(model, parts, output):
    config = BuildIndex(model=model, output=output)
    old = publish(parts["last"], config)
    publish(parts["first"], config)
    age(output)

    def run(function, tasks):
        done = serially(function, tasks)
        update.vacuum(Vacuum(output=output, keep=1))
        return done

    with pytest.raises(FileNotFoundError, match=r"shards/.* was removed .* Run it again"):
        publish("", config, run, kept=old)
    assert len(Index.open(output, deep=True)) == 16


def age(output, days=2):
    """Make all files of an index so much older."""
    then = time.time() - days * 86_400
    for path in versions.walk(output):
        os.utime(path, (then, then))


def test_delete_during_an_addition_is_not_lost(model, parts, output):
    publish(parts["first"], BuildIndex(model=model, output=output))

    def run(function, tasks):
        if versions.current(output) == "v000001":
            delete(DeleteTiles(output=output, ids=("0000003",)))
        return serially(function, tasks)

    with pytest.raises(ValueError, match=r"of version v000001, but v000002 is .* Run it again"):
        join(parts["last"], AddTiles(output=output), run)
    index = Index.open(output)
    assert (index.manifest["version"], list(index.dead)) == ("v000002", [3])
    info = join(parts["last"], AddTiles(output=output))
    assert (info["parent"], list(Index.open(output).dead)) == ("v000002", [3])


def test_tiles_of_another_tower_than_the_current_version_has_are_refused(model, parts, output):
    tile = publish(parts["first"], BuildIndex(model=model, output=output))["parts"]["tile"]
    with pytest.raises(ValueError, match=r"by the tower 0123.*, but v000001 was built"):
        join(parts["last"], AddTiles(output=output), tile="0123")
    assert versions.names(output) == ["v000001"]
    assert join(parts["last"], AddTiles(output=output), tile=tile)["rows"] == 24


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
    assert len(Index.open(output, deep=True).living) == 24
    assert os.listdir(os.path.join(output, "building")) == []  # there was no second one


def test_of_changes_that_end_at_once_one_is_published(tmp_path):
    root, changes = str(tmp_path), 8
    base = versions.commit(root, {"files": {}, "by": "build"}, {})
    together = threading.Barrier(changes)

    def committed(by):
        together.wait()
        try:
            versions.commit(root, {"files": {}, "by": by, "parent": base["version"]}, {})
        except ValueError:
            return None
        return by

    with ThreadPoolExecutor(changes) as pool:
        done = [by for by in pool.map(committed, range(changes)) if by is not None]
    assert [versions.read(root)["by"]] == done
    assert versions.names(root) == ["v000001", "v000002"]


def test_build_beside_which_others_end_is_published_all_the_same(tmp_path):
    root, builds = str(tmp_path), 8
    together = threading.Barrier(builds)

    def committed(_):
        together.wait()
        return versions.commit(root, {"files": {}}, {})["version"]

    with ThreadPoolExecutor(builds) as pool:
        done = list(pool.map(committed, range(builds)))
    assert sorted(done) == versions.names(root)
    assert versions.current(root) == max(done)


def test_manifest_with_a_shard_twice_or_missing_is_refused(model, parts, output):
    info = publish(parts["all"], BuildIndex(model=model, output=output, shard_rows=8))
    first, second, third = info["shards"]
    for wrong in ([first, second, second], [first, third]):
        changed(output, info, shards=wrong)
        with pytest.raises(ValueError, match=r"expected shards .* each once"):
            Index.open(output)
    changed(output, info, shards=[first, second, third])
    assert len(Index.open(output)) == 24


def changed(output, info, **fields):
    """Make a manifest with other fields the current one."""
    versions.commit(output, info | fields | {"parent": versions.current(output)}, {})


def test_verify_deep_asks_no_probe_of_a_tile_that_was_deleted(model, parts, output, tmp_path):
    rows = tiny.rows(24)
    config = BuildIndex(model=model, output=output)
    publish(parts["all"], config, probes=probes_of(rows.slice(0, 3)))

    # One goes for good; another comes again with another picture, as a row of its own.
    delete(DeleteTiles(output=output, ids=("0000000", "0000001")))
    column = rows.column_names.index(schema.AERIAL)
    other = rows.set_column(column, schema.AERIAL, rows[schema.AERIAL].take([23, *range(23)]))
    join(tiny.parts(other.slice(1, 1), model, str(tmp_path / "o")), AddTiles(output=output))
    assert verify(Verify(index=output, deep=True))["probes"] == 3  # their rows are still there
    compact(Compact(output=output))
    assert verify(Verify(index=output, deep=True))["probes"] == 1

    delete(DeleteTiles(output=output, ids=("0000002",)))
    assert compact(Compact(output=output))["probes"] is None
    assert verify(Verify(index=output, deep=True))["probes"] == 0


def test_verify_deep_of_probes_whose_tiles_are_gone_says_that_there_are_none(model, parts, output):
    probes = probes_of(tiny.rows(24).slice(20))
    publish(parts["first"], BuildIndex(model=model, output=output), probes=probes)
    assert verify(Verify(index=output, deep=True))["probes"] == 0


def test_verify_deep_finds_codes_of_another_head_and_other_pictures(
    model, parts, output, monkeypatch
):
    probes = probes_of(tiny.rows(24))
    info = publish(parts["all"], BuildIndex(model=model, output=output), probes=probes)
    found = verify(Verify(index=output, deep=True))
    assert (found["tiles"], found["probes"], found["codes"]) == (24, 16, 24)
    assert found["probes_apart"] < 1e-2

    turned = Matcher.project_tiles
    monkeypatch.setattr(Matcher, "project_tiles", lambda self, x: turned(self, x.flip(1)))
    with pytest.raises(ValueError, match=r"of 16 stored pictures \d+ give other numbers"):
        verify(Verify(index=output, deep=True))
    monkeypatch.undo()

    # A head with other weights: its codes have the right number and size.
    wrong = ann.encoded(
        ann.template("Flat", np.ones((1, 16), np.float32)), [np.eye(24, 16, dtype=np.float32)]
    )
    path = os.path.join(output, info["shards"][0]["codes"])
    faiss.write_index(wrong, path)
    files = info["files"] | versions.files_of(path, os.path.relpath(path, output))
    changed(output, info, files=files)
    assert verify(Verify(index=output))["tiles"] == 24
    with pytest.raises(ValueError, match="are not what its tiles give with the head"):
        verify(Verify(index=output, deep=True))


def test_version_stays_whole_when_equal_weights_come_without_a_file_or_with_one_more(
    parts, output, tmp_path
):
    model = tiny.matcher(str(tmp_path / "model"))
    config = BuildIndex(model=model, output=output)
    readme, more = (tmp_path / "model" / name for name in ("README.md", "more.txt"))
    readme.write_text("What it is.")
    publish(parts["first"], config)
    readme.unlink()
    publish(parts["first"], config)
    readme.write_text("What it is.")
    more.write_text("What else it is.")
    publish(parts["first"], config)
    for version in versions.names(output):
        assert len(Index.open(output, model=model, version=version, deep=True)) == 16


def test_identity_names_the_part_that_changed(model, tmp_path):
    own = fingerprint_parts(model)
    changes = {"tile": "tile_linear", "tail": "candidate_mlp.last", "query": "query_linear"}
    for part, name in changes.items():
        net = Matcher.load(model)
        net.get_submodule(name).weight.data += 1
        net.save(str(tmp_path / part))
        found = fingerprint_parts(str(tmp_path / part))
        assert {key for key in own if own[key] != found[key]} == {part}


def test_open_with_a_model_of_the_same_tower_says_that_no_tile_is_embedded_again(
    model, parts, output, tmp_path
):
    publish(parts["first"], BuildIndex(model=model, output=output))
    net = Matcher.load(model)
    net.candidate_mlp.last.weight.data += 1
    net.save(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"\['tail'\].*no tile is embedded again.*build_index"):
        Index.open(output, model=str(tmp_path / "other"))


def test_disk_that_fills_up_leaves_the_old_version(model, parts, output, tmp_path):
    publish(parts["first"], BuildIndex(model=model, output=output))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (100, 300, 700, 2_000):  # of the files of this small index, in bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises((OSError, RuntimeError)):
                join(parts["last"], AddTiles(output=output))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(Index.open(output, deep=True)) == 16
    join(parts["last"], AddTiles(output=output))
    assert len(Index.open(output, deep=True)) == 24


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An S3 on loopback, with one bucket."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 (takes half a second)
    from pyarrow import fs  # noqa: PLC0415

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    settings = {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint, remote.CACHE: str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=endpoint).create_dir("tiles")
    yield "s3://tiles"
    server.stop()


def test_index_in_an_object_store_is_searched_from_a_copy_and_grows(
    model, parts, bucket, tmp_path, monkeypatch
):
    uri = f"{bucket}/country/index"
    with pytest.raises(FileNotFoundError, match="no index"):
        Index.open(uri)
    info = publish(parts["first"], BuildIndex(model=model, output=uri))
    remote.pushed(uri, info["version"])
    delete(DeleteTiles(output=uri, ids=("0000001",)))
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "another machine"))
    index = Index.open(uri, deep=True)
    assert (len(index), index.manifest["version"], list(index.dead)) == (16, "v000002", [1])
    assert "0000001" not in ids_found(index, "exact")[0]
    # A copy that lost a file gets it again.
    copy = os.path.join(remote.root(uri), "shards", info["shards"][0]["sha"], "u.npy")
    os.remove(copy)
    assert len(Index.open(uri, deep=True)) == 16


def test_index_in_an_object_store_is_opened_by_many_at_once(model, parts, bucket, tmp_path):
    uri = f"{bucket}/index"
    info = publish(parts["first"], BuildIndex(model=model, output=uri))
    remote.pushed(uri, info["version"])
    readers = 4
    together = threading.Barrier(readers)

    def count(_):
        together.wait()
        return [len(Index.open(uri)) for _ in range(5)]

    with ThreadPoolExecutor(readers) as pool:
        assert list(pool.map(count, range(readers))) == [[16] * 5] * readers
    left = [path for path in versions.walk(remote.root(uri)) if ".part" in path]
    assert left == []
