"""One cluster of four nodes for all of these tests (`make test-cluster`), and toys in its store."""

import os

import pytest

from tests.helpers import cluster as nodes
from tests.helpers.cluster import BUCKET, Cluster
from tests.helpers.toys import Toys, make_toys


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A head without CPUs, three workers, a store and an MLflow server."""
    if not nodes.can_run():
        pytest.skip("needs root, and network namespaces")
    before = dict(os.environ)
    with nodes.run_cluster(tmp_path_factory.mktemp("cluster")) as running:
        os.environ |= running.access  # this process looks at the store too
        yield running
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ |= before


@pytest.fixture(scope="session")
def toys(cluster: Cluster, tmp_path_factory) -> Toys:
    """The tiny world, and models of random weights."""
    return make_toys(str(tmp_path_factory.mktemp("toys")), f"s3://{BUCKET}")


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, toys: Toys) -> str:
    """Rows of a run that nothing disturbs."""
    output = f"{toys.bucket}/rows/undisturbed"
    job = cluster.run(*toys.synthesize(output))
    assert job.code == 0, job.log
    return output
