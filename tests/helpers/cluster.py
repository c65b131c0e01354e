"""A Ray cluster of four nodes on one machine, with an S3 store and an MLflow server; needs root.

Each node has its own address, processes, /tmp, home, /dev/shm and token, so that what one writes no
other sees. The head has no CPU, and the workers bear the labels of cluster.yaml.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

ROOT = Path(__file__).parents[2]

HEAD = "head"
WORKERS = {"one": "gpu-train", "two": "gpu-generate", "three": "cpu"}
"""Names of the workers, and their label `pool`."""

CPUS = 4
"""Logical CPUs of a worker."""

BUCKET = "bucket"
"""As in docs/cluster.md."""

_ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HOME": "/tmp/home",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # Several raylets on two cores start slowly, and share one memory.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_agent_register_timeout_ms": "180000",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

# What the node needs of the real /tmp is bound into its own before that takes its place.
_INIT = """
mount --make-rprivate /
for needed in {needed}; do case $needed in /tmp/*)
    mkdir -p {node}$needed; mount --bind $needed {node}$needed;;
esac; done
mount -t tmpfs -o size=600m tmpfs /dev/shm
mount --rbind {node}/tmp /tmp
cd /tmp/home
for attempt in 1 2 3; do ray start {arguments} && break; sleep 2; done
while :; do sleep 3600; done
"""


@dataclass
class Job:
    """A job that was submitted."""

    process: subprocess.Popen
    file: Path
    begun: float

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.file.read_text(errors="replace")

    def wait(self, seconds: float = 900) -> "Job":
        """Wait for its end."""
        self.process.wait(max(1.0, seconds - (time.monotonic() - self.begun)))
        return self

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Wait until it has written a text."""
        while text not in self.log:
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.log[-3000:]}"
            assert time.monotonic() - self.begun < seconds, f"no {text!r}:\n{self.log[-3000:]}"
            time.sleep(0.5)

    @property
    def code(self) -> int:
        """Exit status of `ray job submit`."""
        return self.process.returncode


class Cluster:
    """The nodes and servers, within the block of `run_cluster`."""

    def __init__(self, root: Path) -> None:
        self.root, self.tag = root, f"cvm{os.getpid()}"
        subnet = f"10.77.{os.getpid() % 250 + 1}"
        self.addresses = {name: f"{subnet}.{10 + at}" for at, name in enumerate([HEAD, *WORKERS])}
        self.services, self.outside = f"{subnet}.5", f"{subnet}.1"
        self.endpoint, self.tracking = (
            f"http://{self.services}:9000",
            f"http://{self.services}:5000",
        )
        self.environment = os.environ | _ENVIRONMENT | {"AWS_ENDPOINT_URL": self.endpoint}
        for name in ("RAY_ADDRESS", "RAY_TMPDIR", "PYTHONPATH", "MLFLOW_TRACKING_URI"):
            self.environment.pop(name, None)
        self.inits: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen] = {}

    @property
    def store(self) -> fs.S3FileSystem:
        """The store, as this process reaches it."""
        return fs.S3FileSystem(
            access_key="a", secret_key="b", region="us-east-1",
            endpoint_override=self.endpoint, allow_bucket_creation=True,
        )  # fmt: skip

    @property
    def access(self) -> dict[str, str]:
        """Environment of a process of this machine that looks at the store."""
        names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
        cache = {"CVMATCH_CACHE": str(self.root / "cache")}
        return {name: self.environment[name] for name in names} | cache

    def refuse(self, mode: str) -> None:
        """Let the store answer: `ok`, `503` (it is away), or a share of requests that get 503."""
        aside = self.root / "mode.tmp"
        aside.write_text(mode)
        aside.replace(self.root / "mode")

    def submit(self, *command: str, **variables: str) -> Job:
        """Submit a job from the head, as docs/cluster.md says; `variables` are its environment."""
        runtime = {"env_vars": {"MLFLOW_TRACKING_URI": self.tracking, **variables}}
        submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265"]
        submit += ["--working-dir", str(ROOT), "--runtime-env-json", json.dumps(runtime)]
        file = self.root / f"job-{secrets.token_hex(4)}.log"
        with file.open("w") as log:
            process = self._popen([*self._enter(HEAD), *submit, "--", *command], log)
        return Job(process, file, time.monotonic())

    def run(self, *command: str, seconds: float = 900, **variables: str) -> Job:
        """Submit a job and wait for its end."""
        return self.submit(*command, **variables).wait(seconds)

    def type(self, script: str, **variables: str) -> None:
        """Type lines of a shell on the head, in the checkout, and stop at the first that fails."""
        typed = subprocess.run(
            [*self._enter(HEAD), "bash", "-euo", "pipefail", "-c", f"cd {ROOT}\n{script}"],
            env=self.environment | variables, cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert typed.returncode == 0, f"{script}\n{typed.stdout[-6000:]}\n{typed.stderr[-3000:]}"

    def on(self, node: str, *command: str) -> str:
        """Run a command on a node; return what it prints."""
        entered = [*self._enter(node), *command]
        done = subprocess.run(
            entered, env=self.environment, cwd="/", capture_output=True, text=True, check=True
        )
        return done.stdout

    def start_node(self, name: str) -> None:
        """Start a node, or start one again that was killed."""
        node = self.root / "nodes" / name
        shutil.rmtree(node / "tmp" / "ray", ignore_errors=True)
        (node / "tmp" / "home" / ".ray").mkdir(parents=True, exist_ok=True)
        token = node / "tmp" / "home" / ".ray" / "auth_token"
        token.write_text((self.root / "token").read_text())
        token.chmod(0o600)
        address = self.addresses[name]
        arguments = f"--node-ip-address={address} --disable-usage-stats "
        arguments += (
            "--head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 --labels=pool=head"
            if name == HEAD
            else f"--address={self.addresses[HEAD]}:6379 --num-cpus={CPUS} "
            f"--labels=pool={WORKERS[name]}"
        )
        needed = f"{ROOT} {Path(sys.prefix).resolve()} {self.root}"
        script = _INIT.format(needed=needed, node=node, arguments=arguments)
        isolated = ["unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child", "bash", "-c"]
        with (node / "log").open("a") as log:
            outer = self._popen([*self._network(name), *isolated, script], log)
        self.processes[name] = outer
        self.inits[name] = _first_child(outer.pid)

    def kill_node(self, name: str) -> None:
        """End all processes of a node at once (SIGKILL of the first of its namespace)."""
        os.kill(self.inits.pop(name), 9)
        self.processes.pop(name).wait()

    def wait_for_nodes(self, count: int, seconds: float = 240) -> None:
        """Wait until so many nodes live."""
        code = "import ray; ray.init('auto', log_to_driver=False, logging_level=40)\n"
        code += "print(sum(node['Alive'] for node in ray.nodes()))"
        until, found = time.monotonic() + seconds, ""
        while time.monotonic() < until:
            with contextlib.suppress(subprocess.CalledProcessError):
                found = self.on(HEAD, "python", "-W", "ignore", "-c", code).split()[-1]
                if found == str(count):
                    return
            time.sleep(2)
        logs = "".join(path.read_text()[-1500:] for path in self.root.glob("nodes/*/log"))
        raise TimeoutError(f"expected {count} nodes, got {found}:\n{logs}")

    def open(self) -> None:
        """Start everything."""
        (self.root / "token").write_text(secrets.token_hex(32))
        self._make_network()
        self.refuse("ok")
        server = str(Path(__file__).with_name("refusing_store.py"))
        self._serve("store", "python", server, self.services, "9000", str(self.root / "mode"))
        self.start_tracking()
        self.start_node(HEAD)
        for name in WORKERS:
            self.start_node(name)
        _wait_for(self.endpoint)
        self.store.create_dir(BUCKET)
        self.wait_for_nodes(1 + len(WORKERS))

    def start_tracking(self) -> None:
        """Start the MLflow server, or start it again."""
        self._serve(
            "mlflow", "mlflow", "server",
            "--backend-store-uri", f"sqlite:///{self.root}/mlflow.db",
            "--artifacts-destination", f"{self.root}/artifacts",
            "--host", self.services, "--port", "5000", "--workers", "1",
        )  # fmt: skip

    def stop(self, name: str) -> None:
        """End a server."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()

    def close(self) -> None:
        """End everything, and take the networks away."""
        for name in list(self.inits):
            self.kill_node(name)
        for name in list(self.processes):
            self.stop(name)
        for name in self._networks:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    @property
    def _networks(self) -> list[str]:
        return [f"{self.tag}-{name}" for name in ("services", HEAD, *WORKERS)]

    def _make_network(self) -> None:
        """Hang all nodes, and this process, on a bridge."""
        services, *nodes = self._networks
        for name in self._networks:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", services, "link", "add", "bridge", "type", "bridge")
        _ip("-n", services, "addr", "add", f"{self.services}/24", "dev", "bridge")
        _ip("-n", services, "link", "set", "bridge", "up")
        for name, address in zip(nodes, self.addresses.values(), strict=True):
            port = f"p{address.rpartition('.')[2]}"
            peer = ["peer", "name", "eth0", "netns", name]
            _ip("-n", services, "link", "add", port, "type", "veth", *peer)
            _ip("-n", services, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "route", "add", "default", "dev", "eth0")
        _ip("-n", services, "link", "add", "outside", "type", "veth", "peer", "name", self.tag)
        _ip("-n", services, "link", "set", self.tag, "netns", "1")
        _ip("-n", services, "link", "set", "outside", "master", "bridge", "up")
        _ip("addr", "add", f"{self.outside}/24", "dev", self.tag)
        _ip("link", "set", self.tag, "up")

    def _serve(self, name: str, *command: str) -> None:
        network = ["ip", "netns", "exec", f"{self.tag}-services"]
        with (self.root / f"{name}.log").open("a") as log:
            self.processes[name] = self._popen([*network, *command], log)

    def _network(self, node: str) -> list[str]:
        return ["ip", "netns", "exec", f"{self.tag}-{node}"]

    def _enter(self, node: str) -> list[str]:
        return ["nsenter", "-t", str(self.inits[node]), "-m", "-n", "-p", "--"]

    def _popen(self, command: list[str], log) -> subprocess.Popen:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=self.environment, cwd="/", start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def run_cluster(root: Path) -> Iterator[Cluster]:
    """Start a cluster whose files lie below `root`, and end it after the block."""
    cluster = Cluster(root)
    try:
        cluster.open()
        yield cluster
    finally:
        cluster.close()


def can_run() -> bool:
    """Return whether this machine lets a process make networks."""
    tools = all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter"))
    if not tools or os.geteuid():
        return False
    return subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _first_child(pid: int) -> int:
    """Return the process that is the first of the namespace that `unshare` made."""
    for _ in range(200):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.05)
    raise TimeoutError(f"unshare {pid} started nothing")


def _wait_for(url: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
        else:
            return
