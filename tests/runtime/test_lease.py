import dataclasses
import json
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest

from cvmatch.data import storage
from cvmatch.runtime import lease
from cvmatch.runtime.lease import Holder, Lease


@pytest.fixture(params=["local", "s3"])
def output(request, tmp_path):
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
    return f"{root}/rows"


def leave(output: str, **changes) -> Holder:
    """What a job leaves behind that could not give its lease back."""
    holder = dataclasses.replace(Holder.this_process(), **changes)
    storage.write_bytes(f"{output}.lease", holder.to_bytes())
    return holder


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_second_job_is_refused_and_told_who_writes(output):
    with lease.hold(output):
        with pytest.raises(ValueError, match=r"no other job .* has done so since") as refused:
            Lease(output).take()
        assert Holder.this_process().command in str(refused.value)
    assert not storage.exists(f"{output}.lease")


def test_lease_ends_with_its_block_whatever_happens(output):
    with pytest.raises(KeyError), lease.hold(output):
        raise KeyError
    with lease.hold(output):
        pass


def test_lease_of_a_dead_process_of_this_machine_is_taken_at_once(output):
    leave(output, pid=dead_process())
    with lease.hold(output):
        pass


def test_lease_of_an_older_process_of_the_same_number_is_taken(output):
    leave(output, born=1.0)
    with lease.hold(output):
        pass


ELSEWHERE = pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"space": "pid:[1]"}])


@ELSEWHERE
def test_lease_of_another_machine_is_taken_when_it_is_not_renewed(output, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    left = leave(output, renewed=ago(lease.EXPIRE_S - 2), **elsewhere)
    with lease.hold(output):
        assert left.age_s >= lease.EXPIRE_S


@ELSEWHERE
def test_second_job_is_refused_when_another_machines_renews(output, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    left = leave(output, renewed=ago(30), **elsewhere)
    renewed = dataclasses.replace(left, renewed=ago(0)).to_bytes()
    threading.Timer(0.5, storage.write_bytes, (f"{output}.lease", renewed)).start()
    with pytest.raises(ValueError, match="expected no other job to write it"):
        Lease(output).take()


def test_lease_is_renewed_while_the_job_runs(output, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    renewed = threading.Event()

    class Watched(Lease):
        def renew(self):
            super().renew()
            renewed.set()

    monkeypatch.setattr(lease, "Lease", Watched)
    with lease.hold(output) as held:
        before = held.holder.token
        assert renewed.wait(20)
        held.check()
        assert json.loads(storage.read_bytes(f"{output}.lease"))["token"] == before


def test_job_whose_lease_was_taken_over_stops_and_leaves_it_to_the_other(output):
    first, second = Lease(output), Lease(output)
    first.take()
    storage.remove(first.location)  # as if it had ended
    second.take()
    first.renew()
    with pytest.raises(ValueError, match="another job took over"):
        first.check()
    first.release()
    assert storage.read_bytes(second.location) == second.holder.to_bytes()


def test_of_many_that_take_a_dead_ones_lease_at_once_one_gets_it(output):
    leave(output, pid=dead_process())
    found: list[bool] = []

    def take() -> None:
        try:
            Lease(output).take()
        except ValueError:
            found.append(False)
        else:
            found.append(True)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 7 + [True]
