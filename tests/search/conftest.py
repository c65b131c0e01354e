import pytest

from tests.helpers import index as tiny


@pytest.fixture(scope="package")
def index(tmp_path_factory):
    """An index of 24 tiles."""
    return tiny.index(str(tmp_path_factory.mktemp("search")))
