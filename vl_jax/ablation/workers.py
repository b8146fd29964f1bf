"""Runs one after another in this process, seeds of one arm together, or several in processes of their own.

A run that fails is noted in its folder, and the others go on. A run that another process has begun is left to
it, so that several sweeps of one folder share the work.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from vl_jax import runs
from vl_jax.ablation import state
from vl_jax.checkpoint import CHECKPOINTS
from vl_jax.experiment import Experiment
from vl_jax.runtime import errors
from vl_jax.runtime.lock import InUse
from vl_jax.runtime.start import DISTRIBUTED
from vl_jax.train import signals
from vl_jax.train.loop import LOGS, Stopped

logger = logging.getLogger(__name__)

_SAVING = 600.0  # seconds that a run may take to save when it is asked to stop
_POLL = 0.2  # seconds between two looks at the processes
OUTPUT_FILE = "output.txt"  # what a run in a process of its own printed


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is to be there in the end."""

    folder: Path
    experiment: Experiment  # resolved
    spec: str  # the experiment file, as the command line names it
    overrides: tuple[tuple[str, str], ...]

    @property
    def is_finished(self) -> bool:
        """Whether it is there already."""
        return (self.folder / state.FINISHED_FILE).is_file()

    @property
    def command(self) -> list[str]:
        """What trains it in a process of its own."""
        changes = [f"--config.{path}={text}" for path, text in self.overrides]
        train = [sys.executable, "-m", "vl_jax", "train"]
        return [*train, f"--config={self.spec}", f"--workdir={self.folder}", *changes]


def run(jobs: Sequence[Job], *, parallel: int = 1, together: int = 1) -> list[str]:
    """Runs what is not finished; returns the names of the folders whose runs failed.

    Args:
      parallel: runs at once, each in a process of its own.
      together: without such processes, the most runs that train as one program: those that differ only in
        their seed; see ``runs.run_together``. 0: as many as there are. Fewer do where memory is short.

    Raises:
      Stopped: this process was asked to stop; runs keep their state.
    """
    waiting = [job for job in jobs if not job.is_finished]
    logger.info("%d of %d runs are finished", len(jobs) - len(waiting), len(jobs))
    if parallel == 1:
        return _group_by_group(waiting, together if jax.process_count() == 1 else 1)
    with signals.noted() as stop:
        failed = _at_once(waiting, parallel, stop)
        number = stop()
    if number:
        raise Stopped(number, None)
    return failed


def _group_by_group(jobs: Sequence[Job], together: int) -> list[str]:
    failed, done = [], 0
    for group in _groups(jobs, together):
        names = ", ".join(job.folder.name for job in group)
        logger.info("runs %d to %d of %d: %s", done + 1, done + len(group), len(jobs), names)
        done += len(group)
        failed += _run_group(group)
    return failed


def _groups(jobs: Sequence[Job], together: int) -> list[list[Job]]:
    """The runs in groups that train as one program: they differ in their seed and are at the same step."""
    alike: list[tuple[Experiment, int, list[Job]]] = []
    for job in jobs:
        unseeded, step = dataclasses.replace(job.experiment, seed=0), _newest_step(job.folder)
        for other, at, group in alike:
            if other == unseeded and at == step:
                group.append(job)
                break
        else:
            alike.append((unseeded, step, [job]))
    size = together or len(jobs)
    return [group[i : i + size] for _, _, group in alike for i in range(0, len(group), size)]


def _newest_step(folder: Path) -> int:
    """The step of the newest checkpoint of a run; 0 before the first."""
    return max(
        (int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()), default=0
    )


def _run_group(group: Sequence[Job]) -> list[str]:
    """Runs a group as one program; returns the names of the folders whose runs failed."""
    for job in group:
        (job.folder / state.FAILED_FILE).unlink(missing_ok=True)
    try:
        if len(group) == 1:
            runs.run(group[0].experiment, group[0].folder)
            return []
        reasons = runs.run_together([job.experiment for job in group], [job.folder for job in group])
    except Stopped:
        raise
    except Exception as error:  # whatever it is, the other runs are not to blame
        if len(group) > 1 and "RESOURCE_EXHAUSTED" in str(error):
            half = len(group) // 2
            logger.info("there is no memory for %d runs together; %d are tried", len(group), half)
            return [*_run_group(group[:half]), *_run_group(group[half:])]
        reasons = [error] * len(group)
    failed = []
    for job, reason in zip(group, reasons, strict=True):
        if isinstance(reason, InUse):
            logger.info("%s: left to another process (%s)", job.folder.name, reason)
        elif reason is not None:
            details = "".join(traceback.format_exception(reason))
            _note(job, errors.one_line(reason) or errors.described(reason), details)
            failed.append(job.folder.name)
    return failed


def _note(job: Job, reason: str, details: str) -> None:
    logger.error("%s: %s", job.folder.name, reason)
    (job.folder / LOGS).mkdir(parents=True, exist_ok=True)
    (job.folder / LOGS / "failure.txt").write_text(details, encoding="utf-8")
    state.fail(job.folder, reason)


def _at_once(jobs: Sequence[Job], parallel: int, stop: Callable[[], int | None]) -> list[str]:
    waiting, failed = list(jobs), list[str]()
    running: list[tuple[Job, subprocess.Popen]] = []
    try:
        while (waiting or running) and not stop():
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                logger.info("%s begins; %d runs wait", job.folder.name, len(waiting))
                running.append((job, _begin(job)))
            time.sleep(_POLL)
            ended = [(job, process) for job, process in running if process.poll() is not None]
            running = [(job, process) for job, process in running if (job, process) not in ended]
            for job, process in ended:
                if not _went_well(job, process.returncode):
                    failed.append(job.folder.name)
    finally:  # asked to stop: every run saves its state
        for _, process in running:
            process.terminate()
        for _, process in running:
            _wait_for(process)
    return failed


def _wait_for(process: subprocess.Popen) -> None:
    """Waits until a run has saved; one that stands still is killed."""
    try:
        process.wait(_SAVING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_SAVING)


def _begin(job: Job) -> subprocess.Popen:
    (job.folder / LOGS).mkdir(parents=True, exist_ok=True)
    (job.folder / state.FAILED_FILE).unlink(missing_ok=True)
    # A GPU whose memory one process has taken whole has none for the next.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, DISTRIBUTED: "0"}
    with (job.folder / LOGS / OUTPUT_FILE).open("w", encoding="utf-8") as output:
        return subprocess.Popen(job.command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _went_well(job: Job, code: int) -> bool:
    """Whether a process that has ended did what it should; notes why if it did not."""
    if code == 0:
        logger.info("%s is finished", job.folder.name)
        return True
    path = job.folder / LOGS / OUTPUT_FILE
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    reason = last.removeprefix("error: ")
    if "is in use by another run (" in reason:
        logger.info("%s: left to another process", job.folder.name)
        return True
    if code > 128 or code < 0:
        number = code - 128 if code > 128 else -code
        reason = f"ended by signal {number}" + (" (out of memory, perhaps)" if number == 9 else "")
    logger.error("%s: %s", job.folder.name, reason)
    state.fail(job.folder, reason)
    return False
