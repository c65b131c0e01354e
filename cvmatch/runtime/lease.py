"""One job at a time writes an output: a file beside it says which, for as long as that one lives.

The file is renewed while the job runs. It is taken over when its holder is dead. Where that ran on
this machine, it is known at once; else it is waited for whether the holder renews it, and after
EXPIRE_S seconds without that it is dead.
"""

import contextlib
import dataclasses
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import psutil

from cvmatch.data import storage

RENEW_S = 20.0
"""Seconds between renewals."""

EXPIRE_S = 120.0
"""Seconds after the last renewal for which a lease is valid; clocks may differ by a part of it."""

LOOK_S = 2.0
"""Seconds between looks whether another machine's job renews its lease."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that writes an output."""

    token: str
    host: str
    space: str
    """Namespace of its number: containers of one host may have the same names."""
    pid: int
    born: float
    """When the process began, in seconds since 1970: numbers are used again."""
    command: str
    since: str
    renewed: str
    """UTC, ISO 8601."""

    @classmethod
    def this_process(cls) -> "Holder":
        """Describe this process."""
        now = _now()
        return cls(
            token=uuid.uuid4().hex,
            host=platform.node(),
            space=_process_space(),
            pid=os.getpid(),
            born=psutil.Process().create_time(),
            command=" ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])[:300],
            since=now,
            renewed=now,
        )

    @property
    def age_s(self) -> float:
        """Seconds since it was renewed."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.renewed)).total_seconds()

    @property
    def here(self) -> bool:
        """Whether the process is, or was, one of this machine."""
        return (self.host, self.space) == (platform.node(), _process_space())

    @property
    def may_live(self) -> bool:
        """Whether the process may still write; of this machine, whether it lives."""
        if not self.here:
            return self.age_s < EXPIRE_S
        with contextlib.suppress(psutil.NoSuchProcess):
            return abs(psutil.Process(self.pid).create_time() - self.born) < 1.0
        return False

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(dataclasses.asdict(self)).encode()


class Lease:
    """The right to write an output, within the block of `hold`."""

    def __init__(self, output: str) -> None:
        self.output, self.location = output, f"{output}.lease"
        self.holder = Holder.this_process()
        self.lost = False
        self.error: ValueError | None = None
        """What `check` raised."""

    def __call__(self, _: object) -> None:
        """Check, as a `throughput.StepCallback`."""
        self.check()

    def check(self) -> None:
        """Check that no other job has taken over.

        Raises:
            ValueError: one has, since this one was not heard of for a while.
        """
        if self.lost:
            self.error = ValueError(
                f"{self.output}: this job did not renew {self.location} for {EXPIRE_S:g} s (was it "
                "paused, or the store away?), and another job took over: this one stops. Nothing "
                "is lost."
            )
            raise self.error

    def take(self) -> None:
        """Take the lease, at once or when it is known that the job that has it is dead.

        Raises:
            ValueError: a job that lives has it; says which.
        """
        while True:
            content = self._read()
            found = Holder(**json.loads(content)) if content else None
            if found and (found.may_live if found.here else self._is_renewed(found)):
                raise ValueError(self._describe(found))
            if storage.swap_bytes(self.location, content, self.holder.to_bytes()):
                if found:
                    _log.warning("%s: its job (%s) is dead: going on", self.output, found.command)
                return

    def _is_renewed(self, found: Holder) -> bool:
        """Wait until another machine's job renews its lease, or has to be dead."""
        if found.may_live:
            who = f"{found.command} (process {found.pid} on {found.host})"
            _log.warning("%s: waiting whether %s still writes it", self.output, who)
        while found.may_live:
            time.sleep(LOOK_S)
            content = self._read()
            if content != found.to_bytes():
                return content is not None
        return False

    def renew(self) -> None:
        """Say that this job lives."""
        renewed = dataclasses.replace(self.holder, renewed=_now())
        if storage.swap_bytes(self.location, self.holder.to_bytes(), renewed.to_bytes()):
            self.holder = renewed
        else:
            self.lost = True

    def release(self) -> None:
        """Give it back; where the store is away, it ends by itself."""
        try:
            if self._read() == self.holder.to_bytes():
                storage.remove(self.location)
        except OSError as error:
            _log.warning("%s: cannot remove it: %s", self.location, error)

    def _read(self) -> bytes | None:
        try:
            return storage.read_bytes(self.location)
        except FileNotFoundError:
            return None

    def _describe(self, found: Holder) -> str:
        return (
            f"{self.output}: expected no other job to write it, but `{found.command}` (process "
            f"{found.pid} on {found.host}) has done so since {found.since}, and said so "
            f"{found.age_s:.0f} s ago. Wait for its end, or end it."
        )


@contextlib.contextmanager
def hold(output: str) -> Iterator[Lease]:
    """Hold the lease of an output within the block.

    Raises:
        ValueError: another job that lives writes it; says which.
    """
    lease = Lease(output)
    lease.take()
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(lease, ended), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join(RENEW_S)  # it may wait for a store that is away
        lease.release()


def _renew(lease: Lease, ended: threading.Event) -> None:
    while not (ended.wait(RENEW_S) or lease.lost):
        try:
            lease.renew()
        except OSError as error:  # the store is away: it may be back before the lease ends
            _log.warning("%s: cannot renew it now: %s", lease.location, error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _process_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return ""
