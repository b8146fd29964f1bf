"""The log of a run: one JSON object a line in ``metrics.jsonl``, and the same scalars for TensorBoard.

    {"step": 700, "stage": "sft", "loss": 1.23, "grad_norm": 0.8, "tokens_per_second": 5120.0,
     "routing/load": [layer][modality][expert], "routing/maxvio": [layer], ...}

A run that was killed after step 730 and resumed from its checkpoint at step 700 first drops the lines of
steps 701 to 730, and a line that was cut in half; the checkpoint holds the last line before it, which is
written again if it is lost. The file is then the file of a run never interrupted, except for the values named
in ``TIMING_KEYS``.

TensorBoard gets the figures of single layers too, as ``routing/maxvio/layer_3``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from vl_jax.runtime import disk

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# Clock readings: they differ between two runs whose mathematics is the same.
TIMING_KEYS = ("tokens_per_second", "step_ms", "samples_per_second", "data_wait_ms", "wall_time_s", "mfu")

_RESERVED = ("step", "stage")
# What a log holds beside what a stage's objective measures: the parts of names before a "/".
_BESIDE = (
    *("loss", "auxiliary_loss", "grad_norm", "learning_rate", "flops"),
    *("skipped", "skipped_updates", "routing", "eval"),
)


class MetricsWriter:
    """Appends one line per call of ``write``; each line is on its way to disk when the call returns.

    Only one process of a run may own a writer.

    Args:
      workdir: folder of the run; made if absent.
      resume_step: step of the checkpoint the run continues from: lines of later steps are dropped, and
        writing that step or an earlier one again is an error. None starts a new log.
      last: the last line up to that step, as ``last`` gave it; it is written if the file lacks it.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        resume_step: int | None = None,
        last: Mapping[str, Any] | None = None,
    ):
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        first_step = 0 if resume_step is None else resume_step + 1
        truncate(self.path, first_step=first_step)
        self._first_step = first_step
        self._file = self.path.open("ab", buffering=0)
        self.last = last  # the last line, whoever wrote it
        if last is not None and all(line["step"] < last["step"] for line in read_metrics(self.path)[-1:]):
            self._append(last)
        self._board = _open_board(folder / TENSORBOARD_FOLDER, purge_step=first_step)

    def write(
        self,
        step: int,
        scalars: Mapping[str, Any],
        arrays: Mapping[str, Any] | None = None,
        *,
        stage: str | None = None,
    ) -> None:
        """Writes one line.

        Args:
          step: optimiser steps done so far, counted over all stages; it never decreases.
          scalars: numbers by name, also sent to TensorBoard.
          arrays: arrays or nested lists of numbers by name.
          stage: name of the training stage the step belongs to.

        Raises:
          ValueError: the step is already in the log, or a name is taken.
          OSError: the disk is full, or the file cannot be written for another reason.
        """
        if step < self._first_step:
            raise ValueError(f"step={step}: the log is at step {self._first_step} and steps never decrease")
        arrays = arrays or {}
        for name in arrays:
            if name in scalars:
                raise ValueError(f"metric {name!r} is given both as a scalar and as an array")
        for name in (*scalars, *arrays):
            if name in _RESERVED:
                raise ValueError(f"metric {name!r}: the names {', '.join(_RESERVED)} are reserved")
        self._first_step = step
        line: dict[str, Any] = {"step": step} if stage is None else {"step": step, "stage": stage}
        line |= {name: _finite(float(value)) for name, value in scalars.items()}
        line |= {name: _nested(np.asarray(value, np.float64).tolist()) for name, value in arrays.items()}
        self._append(line)
        self.last = line
        if self._board is not None:
            self._board.write(step, {name: float(value) for name, value in scalars.items()} | _layers(line))

    def _append(self, line: Mapping[str, Any]) -> None:
        content = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        with disk.naming(self.path, needed=len(content)):
            while content:  # A disk that gets full takes a part.
                content = content[self._file.write(content) :]

    def flush(self) -> None:
        """Returns when all lines are on the disk, whatever happens to the machine."""
        with disk.naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files; the writer cannot be used afterwards."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log, in order; [] if there is no file. A last line cut in half is left out.

    Raises:
      ValueError: a line other than the last one is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    result = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            result.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]!r}") from None
    return result


def objective_metrics(line: Mapping[str, Any]) -> list[str]:
    """Names of the numbers of a log line that a stage's objective measured, beside the loss."""
    known = {*_RESERVED, *TIMING_KEYS, *_BESIDE}
    numbers = (name for name, value in line.items() if isinstance(value, (int, float)))
    return [name for name in numbers if name.partition("/")[0] not in known]


def without_timings(line: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs with the same mathematics have in common on one line of their logs."""
    return {name: value for name, value in line.items() if name not in TIMING_KEYS}


def truncate(path: str | Path, *, first_step: int) -> None:
    """Drops the lines of ``first_step`` and later, and a half-written last line.

    The file is replaced in one move, so that being killed here loses nothing that should stay.
    """
    path = Path(path)
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.split(b"\n")[:-1]
    steps = [line["step"] for line in read_metrics(path)]
    kept = [line + b"\n" for line, step in zip(complete, steps, strict=True) if step < first_step]
    if b"".join(kept) == content:
        return
    disk.write_bytes(path, b"".join(kept))


def _finite(value: float) -> float | None:
    """JSON has no name for infinity and not-a-number: they are written as null."""
    return value if math.isfinite(value) else None


def _nested(value: Any) -> Any:
    """Nested lists with seven digits, which is all a float32 holds."""
    return [_nested(v) for v in value] if isinstance(value, list) else _finite(float(f"{value:.7g}"))


def _layers(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of single layers on a line, by names of their own; those of single experts are too many."""
    return {
        f"{name}/layer_{number}": value
        for name, values in line.items()
        if isinstance(values, list)
        for number, value in enumerate(values)
        if isinstance(value, float)
    }


class _Board:
    """Scalars for TensorBoard, on their way to disk when a call returns.

    The writer of tensorboardX does that in a thread, which dies of a full disk, and a run would wait for it.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        """Hides points of earlier runs from ``purge_step`` on; raises ImportError without tensorboardX."""
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._folder, self._summary, self._proto = folder, summary, cast(Any, event_pb2)
        folder.mkdir(parents=True, exist_ok=True)
        with disk.naming(folder):
            self._writer = EventsWriter(str(folder / "events"))
        self._write(step=purge_step, file_version="brain.Event:2")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars that are finite."""
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._write(step=step, summary=self._summary.scalar(name, value))
        with disk.naming(self._folder):
            self._writer.flush()

    def _write(self, **content: Any) -> None:
        with disk.naming(self._folder):
            self._writer.write_event(self._proto.Event(wall_time=time.time(), **content))

    def close(self) -> None:
        """Closes the file."""
        with disk.naming(self._folder):
            self._writer.close()


def _open_board(folder: Path, *, purge_step: int) -> _Board | None:
    """The log for TensorBoard, or None without the package that writes it."""
    try:
        return _Board(folder, purge_step=purge_step)
    except ImportError as error:
        logging.getLogger(__name__).warning("no TensorBoard log: %s", error)
        return None
