import pytest
import torch

from cvmatch.match.infer import EmbedQuery
from tests.helpers import index as tiny


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    """Directory of a tiny matcher."""
    return tiny.matcher(str(tmp_path_factory.mktemp("matcher")))


@pytest.fixture(scope="package")
def parts(model, tmp_path_factory):
    """Directories of embedded tiles: all 24, and some of them."""
    folder = tmp_path_factory.mktemp("parts")
    rows = tiny.rows(24)
    ranges = {"all": (0, 24), "twelve": (0, 12), "first": (0, 16), "last": (16, 8), "again": (5, 1)}
    return {
        name: tiny.parts(rows.slice(begin, count), model, str(folder / name))
        for name, (begin, count) in ranges.items()
    }


@pytest.fixture
def output(tmp_path):
    """Directory of an index that is not there yet."""
    return str(tmp_path / "index")


@pytest.fixture(scope="package")
def index(tmp_path_factory):
    """An index of 24 tiles."""
    return tiny.index(str(tmp_path_factory.mktemp("reader")))


@pytest.fixture(scope="package")
def query(index):
    """Embedded queries of six panoramas."""
    embedded = EmbedQuery(index.matcher_dir, "G+A")(tiny.columns(tiny.rows(6)))
    return torch.from_numpy(embedded["query_vector"])
