"""One Ray, one MLflow store and one embedded world for the whole run."""

import atexit
import os
import shutil
import tempfile
import uuid
from pathlib import Path

# Ray, torch and MLflow read these when they are imported. Ray's folder has a short path of its own
# (sockets allow 107 characters); its workers import the test modules, whose tasks they train.
_TEMPORARY = tempfile.mkdtemp(prefix="cvm-", dir="/tmp")
_ROOT = Path(__file__).parents[1]
os.environ |= {
    "RAY_TMPDIR": _TEMPORARY,
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # the driver waits for them: they should not yield to it
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_TRACKING_URI": f"sqlite:///{_TEMPORARY}/mlflow.db",  # its migrations take 5 s, once
    "PYTHONPATH": str(_ROOT),
}
os.environ.pop("RAY_ADDRESS", None)
atexit.register(shutil.rmtree, _TEMPORARY, ignore_errors=True)

import pytest  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402

from cvmatch.runtime import session  # noqa: E402
from tests.helpers.cvusa import write_official, write_subset  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with 8 logical CPUs and no dashboard."""
    tries = 3  # a raylet has 15 s to start two agents in, which a loaded machine exceeds
    for left in reversed(range(tries)):
        try:
            session.start()
            break
        except Exception:  # Ray raises no narrower one here; the last try's is raised
            if not left:
                raise
            ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture
def subset(tmp_path) -> Path:
    return write_subset(tmp_path)


@pytest.fixture
def official(tmp_path) -> Path:
    return write_official(tmp_path)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An S3 on loopback, with one bucket."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 (only where it is used)
    from pyarrow import fs  # noqa: PLC0415 (only where it is used)

    unique = f"tiles-{uuid.uuid4().hex}"  # all servers of a process have the same content
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    settings = {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint, "CVMATCH_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=endpoint).create_dir(unique)
    yield f"s3://{unique}"
    server.stop()


@pytest.fixture(scope="session")
def world_root(ray_session, tmp_path_factory):
    """Root of the tiny embedded world: 24 training pairs and 12 to validate, 64 x 64 tiles."""
    from cvmatch.demo.procedural.write import make_world  # noqa: PLC0415 (only where it is used)
    from cvmatch.demo.settings import MakeWorld  # noqa: PLC0415 (only where it is used)

    root = str(tmp_path_factory.mktemp("world"))
    make_world(MakeWorld(output=root, preset="tiny"))
    return root


@pytest.fixture(scope="session")
def readme(world_root, ray_session, tmp_path_factory):
    """A folder like a fresh clone, in which the commands of README.md were typed."""
    from tests.helpers import documents  # noqa: PLC0415 (only where it is used)

    address = ray.get_runtime_context().gcs_address
    clone = documents.make_clone(tmp_path_factory.mktemp("clone"), world_root, address)
    clone.run_document(documents.README)
    return clone


@pytest.fixture(autouse=True)
def shown_log(caplog) -> None:
    """Let tests read the package's log, whatever a library has made of levels before."""
    caplog.set_level("WARNING", "cvmatch")
