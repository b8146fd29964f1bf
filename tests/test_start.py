from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import pytest

from vl_jax.runtime import start

FLAG = "--xla_force_host_platform_device_count"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    return monkeypatch


@pytest.mark.parametrize("devices", [8, 100])
def test_simulated_devices_get_eight_threads_each(environment, devices):
    environment.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_math=false {FLAG}={devices}")
    start.give_threads()
    assert int(os.environ["NPROC"]) == max(8 * devices, os.cpu_count())


def test_threads_are_left_alone_without_simulated_devices_or_where_the_user_chose(environment):
    start.give_threads()
    assert "NPROC" not in os.environ
    environment.setenv("NPROC", "3")
    start.simulate_devices(2)
    assert os.environ["NPROC"] == "3"
    assert os.environ["XLA_FLAGS"] == f"{FLAG}=2"


def test_the_number_of_devices_that_the_user_chose_stays(environment):
    environment.setenv("XLA_FLAGS", f"{FLAG}=4")
    start.simulate_devices(8)
    assert os.environ["XLA_FLAGS"] == f"{FLAG}=4"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_xla_has_the_threads_that_it_was_given():
    assert jax.device_count() == 8
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert names.count("tf_XLAEigen") >= 64
