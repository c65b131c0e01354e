import os

import pytest

from cvmatch.index.reader import Index
from cvmatch.match.model import Matcher
from tests.helpers import index as tiny

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    tiny.index(str(path), COUNT)
    tiny.write(tiny.rows(10), str(path / "queries"))
    return str(path)


@pytest.fixture(scope="module")
def index(folder):
    return Index.open(os.path.join(folder, "index"))


@pytest.fixture(scope="module")
def model(index):
    return Matcher.load(index.matcher_dir)
