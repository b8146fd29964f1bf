"""A long run: memory and open files stay what they are."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import chaos
import jax
import pytest

from vl_jax.metrics import METRICS_FILE, read_metrics

STEPS, SETTLED = 2000, 600
MOST = 0.05  # of what is resident: what allocators keep for later differs by so much


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_are_flat_over_two_thousand_steps(tmp_path, monkeypatch):
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    monkeypatch.setenv("VL_JAX_CHAOS_DATA", str(chaos.write_pictures(tmp_path / "data")))
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    often = {"loop.log_every": 20, "loop.checkpoint_every": 200, "loop.evaluate_every": 200}
    often |= {"stages.second.steps": STEPS - 8, "loop.routing_every": 20}
    options = tuple(f"--config.{path}={value}" for path, value in often.items())
    cache = Path(str(jax.config.jax_compilation_cache_dir)) / "chaos"
    running, workdir = chaos.Running(tmp_path / "run", cache, chaos.Harm(options=options)), tmp_path / "run"
    pid, seen = running.process.pid, []
    while running.process.is_alive():
        lines = read_metrics(workdir / METRICS_FILE)
        if lines and lines[-1]["step"] < STEPS:
            try:
                seen.append((lines[-1]["step"], resident(pid), files(pid)))
            except OSError:  # it has just ended
                break
        time.sleep(0.05)
    status, said = running.ends()
    assert status == 0, said
    early = [one for one in seen if SETTLED <= one[0] < SETTLED + 400]
    late = [one for one in seen if one[0] >= STEPS - 400]
    assert early and late, len(seen)
    memory = [max(size for _, size, _ in part) for part in (early, late)]
    assert memory[1] <= (1 + MOST) * memory[0], memory
    # The fewest: a checkpoint that is being written has files open too.
    assert min(count for *_, count in late) <= min(count for *_, count in early), (early[-1], late[-1])
