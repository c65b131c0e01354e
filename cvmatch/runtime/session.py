"""Start Ray, or join the cluster that a job was submitted to."""

import logging
import os
import re

import ray
from ray.data import DataContext

from cvmatch.data import storage
from cvmatch.runtime import internals

LOGICAL_CPUS = 8
"""CPUs that a local Ray counts, where a caller says nothing else."""

NO_PROGRESS_S = 300.0
"""Seconds without a finished block after which a stream fails (Ray waits 1800)."""

LONGEST_SOCKET = 107
"""Bytes of a socket's path at most (Linux)."""

_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"

_NOISE = re.compile(
    "Exception occurred in (user code|Ray Data or Ray Core)|Full stack trace|actor died during init"
)
"""Ray Data's lines about what it raises too, and about a stream that was ended on purpose."""


def start(logical_cpus: int = LOGICAL_CPUS, dashboard: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS (`ray job submit` sets it), else start Ray on this machine.

    A second call in a process changes nothing but the settings of Ray Data.

    Args:
        logical_cpus: of a local Ray, bookkeeping: with fewer than about six, pools starve their
            readers, however many cores there are.
        dashboard: whether a local Ray has one; only searches over Train workers need it.
    """
    if not ray.is_initialized():
        _connect(logical_cpus, dashboard)
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # The second version lists files in tasks that start tasks: 7 s for one small file, against 2.
    context.use_datasource_v2 = False
    if storage.PASSING not in context.retried_io_errors:
        context.retried_io_errors.append(storage.PASSING)
    classes = internals.callback_classes(context)
    if classes is not None and internals.SchedulerThrottle not in classes:
        internals.set_callback_classes(context, [*classes, internals.SchedulerThrottle])


def check_socket_paths() -> None:
    """Check that the paths of Ray's sockets fit, which an operating system keeps short.

    Raises:
        ValueError: the directory of temporary files has too long a path; names the variable.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    folder = os.environ.get(name, "/tmp").rstrip("/")
    if (most := LONGEST_SOCKET - len(_SOCKET)) < (got := len(os.fsencode(folder))):
        raise ValueError(
            f"{name} {folder}: expected at most {most} bytes, since Ray's sockets lie below, got "
            f"{got}. Pass a shorter directory for Ray alone: export RAY_TMPDIR=/tmp"
        )


def has_dashboard() -> bool:
    """Return whether the Ray that this process started or joined has a dashboard."""
    context = ray.init(ignore_reinit_error=True, configure_logging=False)
    return bool(context.dashboard_url)


def _connect(logical_cpus: int, dashboard: bool) -> None:
    # A stream that is stopped early (`take`) cancels its tasks, which is no error.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        _quieten_ray_data(logging.WARNING)  # hangs and full memories: an operator wants to know
    else:
        internals.set_ray_flags(logical_cpus)
        _quieten_ray_data(logging.ERROR)
        check_socket_paths()
        # "local": never join a Ray that somebody else runs on this machine.
        ray.init("local", num_cpus=logical_cpus, include_dashboard=dashboard, **quiet)
        internals.spend_restart_warning()


def _quieten_ray_data(level: int) -> None:
    """Show of Ray Data's log what is as grave, but for `_NOISE`; its file keeps all of it."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(level)
            handler.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not _NOISE.search(record.getMessage())
