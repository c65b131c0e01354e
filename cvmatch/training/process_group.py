"""The process group of Ray Train's workers, on the network between their nodes.

Gloo listens where the name of its host leads, and on Debian that is 127.0.0.1.
"""

import os
import socket
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.util import get_node_ip_address

from cvmatch.runtime import internals

_FOUND = internals.torch_backend()
_Base: Any = _FOUND or object


def choose_gloo_interface() -> None:
    """Name the network interface of this node's address in Ray, where its host's name misleads."""
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    address = get_node_ip_address()
    if named == address or address.startswith("127."):
        return
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Backend(_Base):
    """Names the network interface on each worker, before these join the group."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Start the group."""
        worker_group.execute(choose_gloo_interface)
        super().on_start(worker_group, backend_config)


class ClusterTorchConfig(TorchConfig):
    """Ray's settings of the group, started by `_Backend`."""

    @property
    def backend_cls(self) -> type:
        """What runs on the workers."""
        return _Backend if _FOUND else super().backend_cls
