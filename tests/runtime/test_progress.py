import io
import logging
import threading
import time

import pytest
from rich.console import Console

from cvmatch.runtime import progress


def test_line_gives_count_rate_and_time_left():
    text = progress.line("synthesize", total=1280, done=320, seconds=8.0, note="loss 0.31")
    assert text == "synthesize  320/1280  40/s  0:24 left  loss 0.31"


def test_line_of_a_resumed_run_counts_its_own_rate():
    # 100 of 200 were done before; 10 more took 5 s, so the other 90 take 45 s.
    assert progress.line("train", 200, 110, 5.0, before=100) == "train  110/200  2/s  0:45 left"


def test_line_before_anything_is_done_promises_nothing():
    assert progress.line("index", 50, 0, 3.0) == "index  0/50"


def test_line_without_a_total_gives_the_count():
    assert progress.line("index", 0, 30, 10.0) == "index  30  3/s"


def test_watch_logs_while_the_block_runs_and_once_at_its_end(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_S", 0.02)
    caplog.set_level(logging.INFO, "cvmatch.runtime.progress")
    done = 0
    with progress.watch("rows", 4, lambda: done):
        for done in range(1, 5):  # noqa: B007 (the lambda reads it)
            time.sleep(0.05)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 3
    assert lines[-1].startswith("rows  4/4")


def test_watch_of_what_cannot_be_read_for_a_moment_shows_what_it_read_last(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_S", 0.02)
    caplog.set_level(logging.INFO, "cvmatch.runtime.progress")
    away = False

    def done() -> int:
        if away:
            raise OSError("the store is away")
        return 3

    with progress.watch("rows", 4, done):
        time.sleep(0.05)
        away = True
        time.sleep(0.05)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 3
    assert all(line.startswith("rows  3/4") for line in lines)


def test_watch_of_a_failing_block_stops_its_thread_and_passes_the_error_on():
    before = threading.active_count()
    with pytest.raises(KeyError), progress.watch("rows", 4, lambda: 0):
        raise KeyError("lost")
    assert threading.active_count() == before


def test_bar_shows_the_state_at_the_end():
    finished = threading.Event()
    finished.set()
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    look = progress._Look(lambda: 10, lambda: "loss 0.5")
    progress._bar("train", 10, look, finished, console)
    assert "10/10" in shown.getvalue()
    assert "loss 0.5" in shown.getvalue()


def test_estimate_is_of_what_a_minute_of_work_did_and_said_once():
    estimate = progress.Estimate(total=100_000, gpus=4.0)
    told = [
        estimate.update(rows, now)
        for rows, now in ((10, 0.0), (10, 50.0), (20, 60.0), (600, 100.0))
    ]
    assert told == ["", "", "", ""]  # ten were there before, and the first came after a minute
    # 600 rows in 60 s: the other 99,380 take 9,938 s.
    assert estimate.update(620, 120.0) == "99380 rows at 10/s take 2.8 hours more, 11 GPU hours"
    assert estimate.update(700, 180.0) == ""


def test_estimate_without_gpus_speaks_of_none_and_a_finished_work_has_none():
    estimate = progress.Estimate(total=100, gpus=0.0)
    assert estimate.update(0, 0.0) == estimate.update(40, 1.0) == ""
    assert estimate.update(100, 90.0) == ""
    slower = progress.Estimate(total=100, gpus=0.0)
    assert slower.update(0, 0.0) == slower.update(10, 0.0) == ""
    assert slower.update(46, 3600.0) == "54 rows at 0.01/s take 1.5 hours more"
