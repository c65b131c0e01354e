import os

import faiss
import numpy as np
import pytest

from cvmatch.data import schema
from cvmatch.index import versions
from cvmatch.index.build import publish
from cvmatch.index.settings import AddTiles, BuildIndex, Compact, DeleteTiles, Verify
from cvmatch.index.shortlist import encode, train_empty_index
from cvmatch.index.update import compact, delete, join
from cvmatch.index.verify import select_check_samples, verify
from cvmatch.match.model import Matcher
from tests.helpers import index as tiny
from tests.helpers.present import present


def test_verify_deep_asks_no_sample_of_a_deleted_tile(model, parts, output, tmp_path):
    rows = tiny.rows(24)
    config = BuildIndex(model=model, output=output)
    publish(parts["all"], config, check_samples=select_check_samples(rows.slice(0, 3)))

    # One goes for good; another comes again with another picture, as a row of its own.
    delete(DeleteTiles(output=output, ids=("0000000", "0000001")))
    column = rows.column_names.index(schema.AERIAL)
    other = rows.set_column(column, schema.AERIAL, rows[schema.AERIAL].take([23, *range(23)]))
    join(tiny.parts(other.slice(1, 1), model, str(tmp_path / "o")), AddTiles(output=output))
    assert verify(Verify(index=output, deep=True)).check_samples == 3  # their rows are still there
    compact(Compact(output=output))
    assert verify(Verify(index=output, deep=True)).check_samples == 1

    delete(DeleteTiles(output=output, ids=("0000002",)))
    assert compact(Compact(output=output)).check_samples is None
    assert verify(Verify(index=output, deep=True)).check_samples == 0


def test_verify_deep_of_samples_whose_tiles_are_gone_counts_none(model, parts, output):
    samples = select_check_samples(tiny.rows(24).slice(20))
    publish(parts["first"], BuildIndex(model=model, output=output), check_samples=samples)
    assert verify(Verify(index=output, deep=True)).check_samples == 0


def test_verify_deep_finds_other_codes_and_other_pictures(model, parts, output, monkeypatch):
    samples = select_check_samples(tiny.rows(24))
    info = publish(parts["all"], BuildIndex(model=model, output=output), check_samples=samples)
    found = verify(Verify(index=output, deep=True))
    assert (found.tiles, found.check_samples, found.codes) == (24, 16, 24)
    assert present(found.largest_distance) < 1e-2

    turned = Matcher.embed_tiles
    monkeypatch.setattr(Matcher, "embed_tiles", lambda self, x: turned(self, x.flip(1)))
    with pytest.raises(ValueError, match=r"of 16 stored pictures \d+ have other numbers"):
        verify(Verify(index=output, deep=True))
    monkeypatch.undo()

    # Codes of other vectors, of the right number and size.
    wrong = encode(
        train_empty_index("Flat", np.ones((1, 16), np.float32)), [np.eye(24, 16, dtype=np.float32)]
    )
    path = os.path.join(output, info.shards[0].codes)
    faiss.write_index(wrong, path)
    files = info.files | versions.hash_files(path, os.path.relpath(path, output))
    tiny.change_manifest(output, info, files=files)
    assert verify(Verify(index=output)).tiles == 24
    with pytest.raises(ValueError, match="are not what the codebooks"):
        verify(Verify(index=output, deep=True))
