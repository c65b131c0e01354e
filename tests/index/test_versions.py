import multiprocessing
import os
import resource
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cvmatch.data import storage
from cvmatch.index import versions
from cvmatch.index.build import publish
from cvmatch.index.reader import Index
from cvmatch.index.settings import AddTiles, BuildIndex, DeleteTiles
from cvmatch.index.update import delete, join
from cvmatch.index.writer import serial_map
from tests.helpers import index as tiny


def test_publish_interrupted_at_every_rename_keeps_the_old_version(
    model, parts, output, tmp_path, monkeypatch
):
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    other = tiny.matcher(str(tmp_path / "other"), seed=1)
    more = tiny.parts(tiny.rows(15, seed=1), other, str(tmp_path / "more"))
    rename, failed, calls = os.replace, [], []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 1 + len(failed):
            failed.append(os.path.basename(target))
            raise OSError("power cut")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for trial in range(20):
        place = shutil.copytree(output, tmp_path / f"trial{trial}")
        calls.clear()
        try:
            publish(more, BuildIndex(model=other, output=str(place)))
        except OSError as error:
            assert str(error) == "power cut"  # noqa: PT017
        else:
            assert len(Index.open(str(place), model=other, deep=True)) == 15
            break
        assert len(Index.open(str(place), model=model, deep=True)) == 12
        assert not [name for name in os.listdir(place) if name.startswith(".staging")]
    # matcher, shard.json, shard, codes, ann, and these; the empty index is the same in both.
    assert len(failed) == 8
    assert failed[-3:] == ["rejected.jsonl", "manifest.json", "CURRENT"]


def test_reader_while_a_new_version_is_published_keeps_its_own(model, parts, output, tmp_path):
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    reader = Index.open(output)
    before = np.array(reader.vectors.arrays[0])
    more = tiny.parts(tiny.rows(15, seed=1), model, str(tmp_path / "more"))
    info = publish(more, BuildIndex(model=model, output=output))
    assert (info.version, info.parent) == ("v000002", "v000001")
    np.testing.assert_array_equal(reader.vectors.arrays[0], before)
    assert len(Index.open(output)) == 15
    assert len(Index.open(output, version="v000001")) == 12


def test_publish_same_rows_again_shares_the_files(model, parts, output):
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    assert len(os.listdir(os.path.join(output, "shards"))) == 1
    assert len(os.listdir(os.path.join(output, "matcher"))) == 1
    assert len(os.listdir(os.path.join(output, "versions"))) == 2


def test_check_large_changed_file_is_found_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "SMALL", 3)
    (tmp_path / "file").write_bytes(b"good")
    files = versions.hash_files(str(tmp_path / "file"), "file")
    (tmp_path / "file").write_bytes(b"evil")
    versions.check_files(str(tmp_path), files)
    with pytest.raises(ValueError, match="file is damaged"):
        versions.check_files(str(tmp_path), files, deep=True)


def test_of_changes_that_end_at_once_one_is_published(tmp_path):
    root, changes = str(tmp_path), 8
    base = versions.commit(root, tiny.manifest_of(), {})
    together = threading.Barrier(changes)

    def committed(by):
        together.wait()
        try:
            versions.commit(root, tiny.manifest_of(model=by, parent=base.version), {})
        except ValueError:
            return None
        return by

    with ThreadPoolExecutor(changes) as pool:
        done = [by for by in pool.map(committed, map(str, range(changes))) if by is not None]
    assert [versions.read_version(root).model] == done
    assert versions.list_versions(root) == ["v000001", "v000002"]


def test_build_beside_which_others_end_is_published_all_the_same(tmp_path):
    root, builds = str(tmp_path), 8
    together = threading.Barrier(builds)

    def committed(_):
        together.wait()
        return versions.commit(root, tiny.manifest_of(), {}).version

    with ThreadPoolExecutor(builds) as pool:
        done = list(pool.map(committed, range(builds)))
    assert sorted(done) == versions.list_versions(root)
    assert versions.current_version(root) == max(done)


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
    for version in versions.list_versions(output):
        assert len(Index.open(output, model=model, version=version, deep=True)) == 16


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


def test_index_in_an_object_store_is_searched_from_a_copy_and_grows(
    model, parts, bucket, tmp_path, monkeypatch
):
    uri = f"{bucket}/country/index"
    with pytest.raises(FileNotFoundError, match="no index"):
        Index.open(uri)
    info = publish(parts["first"], BuildIndex(model=model, output=uri))
    versions.push(uri, info.version)
    delete(DeleteTiles(output=uri, ids=("0000001",)))
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "another machine"))
    index = Index.open(uri, deep=True)
    assert (len(index), list(index.deleted)) == (16, [1])
    assert index.manifest.version.startswith("v000002-")
    assert "0000001" not in tiny.find_ids(index, "exact")[0]
    # A copy that lost a file gets it again.
    copy = os.path.join(versions.local_root(uri), "shards", info.shards[0].sha, "vectors.npy")
    os.remove(copy)
    assert len(Index.open(uri, deep=True)) == 16


def test_change_of_an_index_in_an_object_store_follows_one_from_elsewhere(
    model, parts, bucket, tmp_path, monkeypatch
):
    uri = f"{bucket}/index"
    info = publish(parts["first"], BuildIndex(model=model, output=uri))
    versions.push(uri, info.version)
    copy, seen = os.environ[storage.CACHE], []

    def run(function, tasks):
        if not seen:
            seen.append(tasks)
            monkeypatch.setenv(storage.CACHE, str(tmp_path / "another machine"))
            delete(DeleteTiles(output=uri, ids=("0000003",)))
            monkeypatch.setenv(storage.CACHE, copy)
        return serial_map(function, tasks)

    new = join(parts["last"], AddTiles(output=uri), run)
    with pytest.raises(versions.StaleVersionError, match="Run it again"):
        versions.push(uri, new.version)
    versions.fetch(uri)
    versions.push(uri, join(parts["last"], AddTiles(output=uri)).version)
    index = Index.open(uri, deep=True)
    assert (len(index), list(index.deleted)) == (24, [3])


def delete_each(uri: str, ids: list[str], cache: str) -> None:
    """In a process of its own, as on another machine."""
    os.environ[storage.CACHE] = cache
    for name in ids:
        delete(DeleteTiles(output=uri, ids=(name,)))


@pytest.mark.slow
def test_two_publishers_of_an_index_in_an_object_store_lose_no_change_of_fifty(
    model, bucket, tmp_path
):
    uri, rows = f"{bucket}/index", tiny.rows(60)
    info = publish(
        tiny.parts(rows, model, str(tmp_path / "parts")), BuildIndex(model=model, output=uri)
    )
    versions.push(uri, info.version)
    ids = rows["pair_id"].to_pylist()[:50]
    context = multiprocessing.get_context("spawn")
    both = [
        context.Process(target=delete_each, args=(uri, ids[half::2], str(tmp_path / f"{half}")))
        for half in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    index = Index.open(uri, deep=True)
    assert list(index.deleted) == list(range(50))
    assert int(index.manifest.version[1:7]) == 51


def test_index_in_an_object_store_is_opened_by_many_at_once(model, parts, bucket, tmp_path):
    uri = f"{bucket}/index"
    info = publish(parts["first"], BuildIndex(model=model, output=uri))
    versions.push(uri, info.version)
    readers = 4
    together = threading.Barrier(readers)

    def count(_):
        together.wait()
        return [len(Index.open(uri)) for _ in range(5)]

    with ThreadPoolExecutor(readers) as pool:
        assert list(pool.map(count, range(readers))) == [[16] * 5] * readers
    left = [path for path in versions.walk_files(versions.local_root(uri)) if ".part" in path]
    assert left == []
