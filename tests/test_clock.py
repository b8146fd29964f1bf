"""The time that is left follows from steady steps; signals are noted, and a watch ends what stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vl_jax.train import signals
from vl_jax.train.clock import Pace
from vl_jax.train.watchdog import EXIT_STATUS, STACKS_FILE, Watchdog, WatchdogConfig

ROOT = Path(__file__).resolve().parent.parent


def test_steps_that_compile_do_not_count_in_the_time_that_is_left():
    now = [0.0]
    pace = Pace(lambda: now[0])

    def step(seconds: float) -> float | None:
        now[0] += seconds
        pace.step()
        return pace.remaining(10)

    pace.begin()
    assert [step(s) for s in (600.0, 30.0, 2.0, 4.0)] == [None, None, 20.0, 30.0]
    now[0] += 50.0  # between stages
    pace.begin()
    assert [step(s) for s in (500.0, 20.0, 3.0)] == [30.0, 30.0, 30.0]


@pytest.mark.parametrize("number", signals.ASKING)
def test_a_signal_is_noted_and_what_was_before_comes_back(number):
    before = {n: signal.getsignal(n) for n in signals.ASKING}
    with signals.noted() as stop:
        assert stop() is None
        os.kill(os.getpid(), number)
        assert stop() == number
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler repeats itself
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop() == number
    assert {n: signal.getsignal(n) for n in signals.ASKING} == before


def test_a_run_under_nohup_goes_on_when_its_terminal_closes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def script(lines: str, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", lines, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_second_interrupt_ends_at_once_with_one_line():
    lines = """
import time
from vl_jax.train import signals
with signals.noted() as stop:
    print("ready", flush=True)
    while stop() is None:
        time.sleep(0.01)
    print("noted", flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep(60)
"""
    with script(lines) as process:
        assert process.stdout is not None and process.stderr is not None
        for said in (b"ready\n", b"noted\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
        assert process.stderr.read().strip().splitlines() == [
            b"ended at once, without saving; run again to resume from the last checkpoint"
        ]


def test_a_watch_warns_with_stacks_and_then_ends(tmp_path, monkeypatch, caplog, capfd):
    ended = threading.Event()

    def end(status: int) -> None:
        assert status == EXIT_STATUS
        watch.rest()  # in place of the end of the process
        ended.set()

    monkeypatch.setattr(os, "_exit", end)
    config = WatchdogConfig(warn_after=0.1, end_after=0.4, compile_allowance=30.0)
    with Watchdog(config, tmp_path / "logs") as watch:
        watch.alive("compiling", compiles=True)
        time.sleep(0.6)
        watch.rest()
        time.sleep(0.2)
        assert not ended.is_set() and not caplog.records
        watch.alive("waiting for the data of step 7")
        assert ended.wait(10)
    assert [r.message.partition(" s (")[2] for r in caplog.records] == [
        f"waiting for the data of step 7); what its threads do is in {tmp_path / 'logs' / STACKS_FILE}"
    ]
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: nothing has moved for ") and "end_after=0.4" in line
    stacks = (tmp_path / "logs" / STACKS_FILE).read_text()
    assert stacks.count("waiting for the data of step 7") == 2
    assert "test_a_watch_warns_with_stacks_and_then_ends" in stacks


def test_a_watch_over_a_run_that_moves_leaves_nothing(tmp_path):
    config = WatchdogConfig(warn_after=0.3, end_after=0.6)
    with Watchdog(config, tmp_path / "logs") as watch:
        for _ in range(20):
            watch.alive("stepping")
            time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_thread_that_keeps_the_lock_of_python_is_ended_too(tmp_path):
    lines = """
import re, sys, pathlib, threading
from vl_jax.train import watchdog
watchdog._SUSPENDED = 0.5
config = watchdog.WatchdogConfig(0.5, 1.0, 0.0)
with watchdog.Watchdog(config, pathlib.Path(sys.argv[1])) as watch:
    watch.alive("waiting")
    threading.Event().wait(0.3)
    re.match("(a*)*b", "a" * 40)
"""
    with script(lines, str(tmp_path)) as process:
        assert process.wait(60) == 1
    assert "Timeout" in (tmp_path / STACKS_FILE).read_text()


def test_a_watch_that_would_end_before_it_warns_is_refused():
    with pytest.raises(ValueError, match=r"end_after=5\.0 is below warn_after=9\.0"):
        WatchdogConfig(warn_after=9.0, end_after=5.0)
    with pytest.raises(ValueError, match=r"warn_after=-1\.0 must be >= 0"):
        WatchdogConfig(warn_after=-1.0)
