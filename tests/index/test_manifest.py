import json
import os

import pytest

from cvmatch.index import versions
from cvmatch.index.build import publish
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from tests.helpers import index as tiny


def test_open_changed_manifest_or_missing_file_is_refused(model, parts, output):
    info = publish(parts["twelve"], BuildIndex(model=model, output=output))
    path = os.path.join(output, "versions", "v000001", "manifest.json")
    changed = json.dumps(info.plain() | {"rows": 11})
    versions.write_file(path, changed.encode())
    with pytest.raises(ValueError, match="the manifest was changed"):
        Index.open(output)
    versions.write_file(path, info.to_json().encode())
    os.remove(os.path.join(output, info.ann.parts[0].file))
    with pytest.raises(FileNotFoundError, match=r"ann/.*\.faiss is missing"):
        Index.open(output)


def test_manifest_with_a_shard_twice_or_missing_is_refused(model, parts, output):
    info = publish(parts["all"], BuildIndex(model=model, output=output), shard_rows=8)
    first, second, third = info.shards
    for wrong in ((first, second, second), (first, third)):
        tiny.change_manifest(output, info, shards=wrong)
        with pytest.raises(ValueError, match=r"expected shards .* each once"):
            Index.open(output)
    tiny.change_manifest(output, info, shards=(first, second, third))
    assert len(Index.open(output)) == 24


def test_manifest_read_equals_the_one_that_was_written(model, parts, output, tmp_path):
    queries = tiny.write(tiny.rows(12), str(tmp_path / "queries"))
    info = publish(parts["twelve"], BuildIndex(model=model, output=output, queries=queries))
    assert versions.read_version(output) == info
    assert info.recall is not None


def test_index_of_an_older_format_says_how_to_build_it_again(model, parts, output):
    publish(parts["twelve"], BuildIndex(model=model, output=output))
    path = os.path.join(output, "versions", "v000001", "manifest.json")
    versions.write_file(path, json.dumps({"format": 2, "ann": {"probes": 64}}).encode())
    expected = r"expected an index of format 4, got 2.* again with: cvmatch build-index --output"
    with pytest.raises(ValueError, match=expected):
        Index.open(output)
    assert publish(parts["twelve"], BuildIndex(model=model, output=output)).version == "v000002"
