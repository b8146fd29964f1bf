"""Processes that SLURM starts train as one process does; whoever is gone, stuck or different is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vl_jax import cli
from vl_jax.metrics import METRICS_FILE, read_metrics
from vl_jax.runtime.hosts.pulse import LOST

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict
pytest.importorskip("grain")

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests" / "tiny_experiment.py")
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.expert=2")
STEPS = 16

pytestmark = pytest.mark.slow


def launch(
    workdir: Path, config: str, *options: str, processes: int = 2, skip: int = -1, odd: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts the processes of a job on eight devices; each writes to a file of its own beside the run.

    Args:
      skip: the process that does not come.
      odd: more options of the last one.
    """
    with socket.socket() as probe:  # the port follows from the last 12 bits of the job
        probe.bind(("localhost", 0))
        job = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        if rank == skip:
            continue
        flags = f"--xla_force_host_platform_device_count={8 // processes} --xla_backend_optimization_level=0"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(processes),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NNODES": "1",
        }
        given = [f"--config={config}", f"--workdir={workdir}", *MESH, *options]
        given += odd if rank == processes - 1 else ()
        command = [sys.executable, "-m", "vl_jax", "train", *given]
        with output_of(workdir, rank).open("a", encoding="utf-8") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        started.append(process)
    return started


def reaches(processes: list[subprocess.Popen], workdir: Path, step: int) -> None:
    """Waits for a step in the log, or the end of a process."""
    while all(process.poll() is None for process in processes):
        if any(line["step"] >= step for line in read_metrics(workdir / METRICS_FILE)):
            return
        time.sleep(0.01)


def last_line(workdir: Path, rank: int) -> str:
    return output_of(workdir, rank).read_text(encoding="utf-8").strip().splitlines()[-1]


def output_of(workdir: Path, rank: int) -> Path:
    return workdir.with_suffix(f".output{rank}")


def wait(processes: list[subprocess.Popen]) -> list[int]:
    end = time.monotonic() + 900
    try:
        return [process.wait(max(1.0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        return [-1 if process.poll() is None else process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir: Path) -> list[float]:
    lines = read_metrics(workdir / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def test_processes_stop_together_resume_on_more_evaluate_and_log_as_one_does(tmp_path):
    """Each fills its own packed rows. One of them is asked to stop; two go on as four."""
    config, single, workdir = f"{TINY}:packed", tmp_path / "single", tmp_path / "run"
    assert cli.main(["train", f"--config={config}", f"--workdir={single}", *MESH]) == 0
    processes = launch(workdir, config, "--config.loop.log_every=1")
    reaches(processes, workdir, 5)
    processes[1].send_signal(signal.SIGTERM)
    assert wait(processes) == [128 + signal.SIGTERM] * 2
    stopped = {last_line(workdir, rank) for rank in range(2)}
    assert len(stopped) == 1 and stopped.pop().startswith("stopped at step ")
    statuses = wait(launch(workdir, config, processes=4))
    said = [output_of(workdir, rank).read_text(encoding="utf-8") for rank in range(4)]
    assert statuses == [0] * 4, said
    np.testing.assert_allclose(losses(workdir), losses(single), rtol=1e-5)
    found, expected = (json.loads((w / f"eval/heldout/{STEPS}.json").read_text()) for w in (workdir, single))
    assert found["scores"]["count"] == expected["scores"]["count"]
    assert "ETA" in said[0] and "ETA" not in said[1]
    assert (workdir / "report.html").is_file()
    assert {f"{rank}.log" for rank in range(4)} <= {path.name for path in (workdir / "logs").iterdir()}


def test_one_that_stands_still_one_that_differs_and_one_that_is_not_there_are_named(tmp_path):
    workdir, impatient = tmp_path / "run", "--config.loop.watchdog.silent_after=5"
    processes = launch(workdir, TINY, impatient)
    reaches(processes, workdir, 5)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(900) == LOST
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=30)
    assert last_line(workdir, 0).startswith("error: process 1 (host ")
    assert "no sign of life for 5 s" in last_line(workdir, 0)
    assert read_metrics(workdir / METRICS_FILE)  # a launch resumes it

    assert wait(launch(workdir, TINY, odd=("--config.seed=7",))) == [2, 2]
    assert "process 1 (host " in last_line(workdir, 0) and "config.seed is 7" in last_line(workdir, 0)
    assert last_line(workdir, 0) == last_line(workdir, 1)

    assert wait(launch(workdir, TINY, "--join-within=3", processes=4, skip=2)) == [LOST] * 3
    assert all("process 2 of 4 has not come within 3 s" in last_line(workdir, rank) for rank in (0, 1, 3))
