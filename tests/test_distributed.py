"""Two processes of four devices each, started as SLURM starts them, train as one process of eight does."""

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

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict
pytest.importorskip("grain")

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests" / "tiny_experiment.py")
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.expert=2")
STEPS = 16

pytestmark = pytest.mark.slow


def launch(workdir: Path, config: str) -> list[subprocess.Popen]:
    """Starts both processes of a job; each writes to a file of its own beside the run."""
    with socket.socket() as probe:  # jax takes its port from the last 12 bits of the job
        probe.bind(("localhost", 0))
        job = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "VL_JAX_DISTRIBUTED": "1",
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NNODES": "1",
        }
        options = [f"--config={config}", f"--workdir={workdir}", *MESH]
        command = [sys.executable, "-m", "vl_jax", "train", *options]
        with output_of(workdir, rank).open("a", encoding="utf-8") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        processes.append(process)
    return processes


def output_of(workdir: Path, rank: int) -> Path:
    return workdir.with_suffix(f".output{rank}")


def wait(processes: list[subprocess.Popen]) -> list[int]:
    try:
        return [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir: Path) -> list[float]:
    lines = read_metrics(workdir / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def test_two_processes_stop_resume_evaluate_and_log_as_one_does(tmp_path):
    """Each fills its own packed rows."""
    config, single, workdir = f"{TINY}:packed", tmp_path / "single", tmp_path / "run"
    assert cli.main(["train", f"--config={config}", f"--workdir={single}", *MESH]) == 0
    processes = launch(workdir, config)
    while all(process.poll() is None for process in processes):
        if any(line["step"] >= 5 for line in read_metrics(workdir / METRICS_FILE)):
            for process in processes:
                process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    assert wait(processes) == [128 + signal.SIGTERM] * 2
    statuses = wait(launch(workdir, config))
    said = [output_of(workdir, rank).read_text(encoding="utf-8") for rank in range(2)]
    assert statuses == [0, 0], said
    np.testing.assert_allclose(losses(workdir), losses(single), rtol=1e-5)
    found, expected = (json.loads((w / f"eval/heldout/{STEPS}.json").read_text()) for w in (workdir, single))
    assert found["scores"]["count"] == expected["scores"]["count"]
    assert "ETA" in said[0] and "ETA" not in said[1]
    assert (workdir / "report.html").is_file()
