"""One process at a time runs in a folder; its lock goes with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vl_jax.runtime import lock

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import pathlib, sys, time
from vl_jax.runtime import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_told_who_holds(tmp_path):
    folder = tmp_path / "runs" / "one"
    with lock.held(folder):
        with pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on ") as caught:
            with lock.held(folder):
                pass
        assert "\n" not in str(caught.value)
        with lock.held(tmp_path / "runs" / "two"):
            pass
    with lock.held(folder):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"process {process.pid} on "):
            with lock.held(tmp_path):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    time.sleep(0.01)
    with lock.held(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.held(tmp_path):
        assert "cannot be locked" in caplog.text
