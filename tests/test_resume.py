"""A run that was stopped or killed, at any moment, ends with the log of a run that never was."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from vl_jax import cli, experiment, runs
from vl_jax.config import load
from vl_jax.fit import chips
from vl_jax.metrics import METRICS_FILE, read_metrics, without_timings
from vl_jax.runtime.spent import GOODPUT_FILE, account, read_ledger
from vl_jax.schema import from_json, to_json

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict
pytest.importorskip("grain")

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests" / "tiny_experiment.py")
STEPS = 16


def log(workdir: Path) -> list[dict]:
    return [without_timings(line) for line in read_metrics(workdir / METRICS_FILE)]


def train(workdir: Path, config: str = TINY) -> int:
    return cli.main(["train", f"--config={config}", f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(workdir) == 0
    return workdir


class Interruption:
    """Wraps the streams of a run; before the batch of step ``at`` it does ``action``, once."""

    def __init__(self, monkeypatch, at: int, action):
        self.left, self.action = at + 1, action  # the first of all is the fixed batch of ``churn``
        original = experiment.open_stream

        def open_stream(*args):
            stream = original(*args)
            following = stream.__next__

            class Wrapped:
                skipped, ids = property(lambda _: stream.skipped), property(lambda _: stream.ids)
                get_state, set_state, close = stream.get_state, stream.set_state, stream.close

                def __next__(_):
                    self.left -= 1
                    if self.left == 0:
                        self.action()
                    return following()

            return Wrapped()

        monkeypatch.setattr(runs, "open_stream", open_stream)


@pytest.mark.slow
def test_the_log_has_every_step_of_both_stages_once(uninterrupted):
    lines = log(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["stage"] for line in lines] == ["first"] * 9 + ["second"] * 7
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert all(0 <= line["routing/churn"][0] <= 1 for line in lines if "routing/load" in line)
    assert (uninterrupted / "report.html").exists()
    assert (uninterrupted / "eval" / "heldout" / f"{STEPS}.json").exists()


class Crash(BaseException):
    """Stands for whatever may end a process."""


@pytest.mark.slow
def test_a_run_that_crashed_and_was_stopped_again_and_again_has_the_same_log(
    uninterrupted, tmp_path, monkeypatch, capsys
):
    run, path = tmp_path / "run", tmp_path / "run" / METRICS_FILE

    def crash():
        raise Crash

    def go_on(moment: int, action) -> int:
        """Does the action before the batch of the step that is so many behind the newest checkpoint."""
        with monkeypatch.context() as patch:
            Interruption(patch, moment, action)
            return train(run)

    def crashed(moment: int) -> None:
        with pytest.raises(Crash):
            go_on(moment, crash)

    def stopped(moment: int, number: signal.Signals, step: int) -> None:
        assert go_on(moment, lambda: os.kill(os.getpid(), number)) == 128 + number
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == f"stopped at step {step} by {number.name}; state is saved, run again to resume"
        assert len(log(run)) == step

    crashed(3)  # before there is any checkpoint
    stopped(6, signal.SIGINT, 6)
    path.write_bytes(path.read_bytes()[:-20])  # as after a crash of the machine
    crashed(6)  # in the second stage, two steps behind the checkpoint of its beginning
    assert len(log(run)) == 11
    stopped(2, signal.SIGHUP, 11)
    shutil.copytree(run, tmp_path / "two")
    assert train(run) == 0
    assert log(run) == log(uninterrupted)

    with monkeypatch.context() as patch:  # another number of devices goes on with the same run
        devices = jax.devices()[:2]
        patch.setattr(jax, "devices", lambda: devices)
        assert train(tmp_path / "two") == 0
    lines, expected = log(tmp_path / "two"), log(uninterrupted)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    np.testing.assert_allclose([x["loss"] for x in lines], [x["loss"] for x in expected], rtol=1e-4)


@pytest.mark.slow
def test_launching_a_finished_run_again_changes_nothing(uninterrupted):
    before = (uninterrupted / METRICS_FILE).read_bytes()
    assert train(uninterrupted) == 0
    assert (uninterrupted / METRICS_FILE).read_bytes() == before


@contextlib.contextmanager
def launch(workdir: Path, config: str) -> Iterator[subprocess.Popen]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    }
    command = [sys.executable, "-m", "vl_jax", "train", f"--config={config}", f"--workdir={workdir}"]
    with output_of(workdir).open("a", encoding="utf-8") as output:
        with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
            yield process


def output_of(workdir: Path) -> Path:
    return workdir.with_suffix(".output")


def interrupt(workdir: Path, *, step: int, number: int, delay: float = 0.0, config: str = TINY) -> int:
    """Launches the run and sends a signal some seconds after its log has reached a step; its exit status."""
    with launch(workdir, config) as process:
        while process.poll() is None:
            lines = read_metrics(workdir / METRICS_FILE)
            if lines and lines[-1]["step"] >= step:
                time.sleep(delay)
                process.send_signal(number)
                return process.wait(600)
            time.sleep(0.005)
        return process.returncode


def finish(workdir: Path, config: str = TINY) -> None:
    with launch(workdir, config) as process:
        assert process.wait(600) == 0, output_of(workdir).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_process_killed_at_many_moments_resumes_with_the_same_log(tmp_path):
    config, whole, run = f"{TINY}:packed", tmp_path / "whole", tmp_path / "run"
    assert train(whole, config) == 0
    # The first step, while a checkpoint is written, as a stage ends, and as the run ends.
    for step, delay in [(1, 0.0), (4, 0.05), (9, 0.0), (16, 0.0)]:
        interrupt(run, step=step, number=signal.SIGKILL, delay=delay, config=config)
    finish(run, config)
    assert log(run) == log(whole)


@pytest.mark.slow
def test_a_process_asked_to_stop_exits_with_the_number_of_the_signal(tmp_path):
    status = interrupt(tmp_path / "run", step=5, number=signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "state is saved, run again to resume" in output_of(tmp_path / "run").read_text(encoding="utf-8")


POISON = """
import dataclasses
import jax
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Poison:
    last: int = 6

    def __call__(self, step):
        def poisoned(state, batch, rate):
            bad = (state.step >= 4) & (state.step < self.last)
            new, metrics = step(state, batch, jnp.where(bad, jnp.nan, rate))
            return new, metrics | {"grad_norm": jnp.where(bad, jnp.inf, metrics["grad_norm"])}
        return poisoned
"""


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_too_many_end_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "poison.py").write_text(POISON)
    wrap = ["--config.stages.first.wrap", f"{tmp_path}/poison.py:Poison"]

    def run(workdir: Path, most: int = 3) -> int:
        options = [*wrap, f"--config.loop.guard.max_in_a_row={most}"]
        return cli.main(["train", f"--config={TINY}", f"--workdir={workdir}", *options])

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole) == 0
    lines = log(whole)
    assert [line.get("skipped_updates") for line in lines] == [None] * 4 + [1] + [2] * 11
    assert all(np.isfinite(line["loss"]) for line in lines)
    with monkeypatch.context() as patch:
        Interruption(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(stopped) == 128 + signal.SIGTERM
    assert run(stopped) == 0
    assert log(stopped) == lines
    described = "logs/skipped_updates.jsonl"
    assert (stopped / described).read_bytes() == (whole / described).read_bytes()
    capsys.readouterr()
    assert run(tmp_path / "ruined", most=2) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the update of step 6 was skipped") and "those of step 4" in error
    assert [p.name for p in (tmp_path / "ruined" / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]


def test_the_tiny_experiment_survives_its_own_json():
    built = load(TINY)
    assert from_json(to_json(built), experiment.Experiment) == built


@pytest.mark.slow
def test_the_ledger_of_a_crashed_run_says_what_was_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, "peak_of", lambda kind: 1e9)
    with monkeypatch.context() as patch, pytest.raises(Crash):

        def crash():
            raise Crash

        Interruption(patch, 7, crash)
        train(tmp_path)
    half = account(read_ledger(tmp_path / GOODPUT_FILE))
    assert half is not None and half.steps == 6 and half.seconds["wasted"] == 0
    assert train(tmp_path) == 0
    found = account(read_ledger(tmp_path / GOODPUT_FILE))
    assert found is not None
    assert (found.launches, found.steps, found.wasted_steps) == (2, STEPS, 2)
    assert abs(found.remainder) < 0.01 * found.wall
    kinds = ("step", "wasted", "initialisation", "restore", "compile", "checkpoint", "evaluation", "report")
    assert all(found.seconds[kind] > 0 for kind in kinds)
    assert found.hits + found.misses > 0
    assert found.mfu is not None and found.overall_mfu is not None and 0 < found.overall_mfu < found.mfu
    logged = [line["mfu"] for line in read_metrics(tmp_path / METRICS_FILE)]
    assert len(logged) == STEPS and min(logged) > 0
    page = (tmp_path / "report.html").read_text()
    assert "steps done again" in page and "Model flops utilisation" in page and "not explained" in page
