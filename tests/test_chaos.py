"""Whatever happens to a run, and whenever: it goes on, and ends as the run that nothing happened to.

``VL_JAX_CHAOS=100`` says how many blows there are, ``VL_JAX_CHAOS_SEED=1`` which; see ``chaos.py``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import chaos
import jax
import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork servers"),
]
BLOWS, SEED = int(os.environ.get("VL_JAX_CHAOS", "20")), os.environ.get("VL_JAX_CHAOS_SEED", "0")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    monkeypatch.setenv("VL_JAX_CHAOS_DATA", str(chaos.write_pictures(tmp_path / "data")))
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return Path(str(jax.config.jax_compilation_cache_dir)) / "chaos"


def test_whatever_happens_a_run_goes_on_and_ends_as_if_nothing_had(tmp_path, cache, capsys):
    def tell(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    chaos.deal(tmp_path, cache, blows=BLOWS, seed=SEED, kinds=chaos.SINGLE + chaos.PAIR, tell=tell)


def test_a_run_that_moves_from_mesh_to_mesh_ends_with_the_same_parameters(tmp_path, cache):
    """Eight devices, four, one, and two processes of four; each but the last is killed.

    AdamW divides a gradient by its own size: where a gradient is nothing but rounding, which differs with the
    mesh, its update is a whole one for an epsilon of 1e-8. So epsilon is larger here.
    """
    steady = tuple(f"--config.stages.{stage}.optimizer.epsilon=1e-3" for stage in ("first", "second"))
    strikes, chance, workdir = chaos.Chaos(tmp_path, cache), random.Random(SEED), tmp_path / "run"
    strikes.finish(tmp_path / "whole", options=steady)
    for devices in (8, 4, 1):
        lines = len(chaos.read_metrics(workdir / chaos.METRICS_FILE))
        running = chaos.Running(workdir, cache, chaos.Harm(devices=devices, options=steady))
        running.reaches(workdir, lines + chance.randint(3, 5))
        running.send(signal.SIGKILL)
        strikes.check(workdir, "kill", *running.ends())
    strikes.finish(workdir, processes=2, devices=4, options=steady)
    whole, moved = chaos.final_params(tmp_path / "whole"), chaos.final_params(workdir)
    print("largest difference", max(np.abs(a - b).max() for a, b in zip(whole, moved, strict=True)))
    for a, b in zip(whole, moved, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
