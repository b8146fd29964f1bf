"""A trace of some steps of a run, for a profiler: what every device and thread did, and when."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax

logger = logging.getLogger(__name__)

PROFILE = "profile"  # the folder of a run for its traces
Metrics = TypeVar("Metrics")


@runtime_checkable
class StepTaken(Protocol):
    """What a hook is told of a step."""

    @property
    def global_step(self) -> int: ...


def steps_of(text: str, total: int) -> range:
    """The steps that ``--profile`` names, ``12`` or ``10-12``, counted from 1 over all stages of a run.

    Raises:
      ValueError: there are no such steps.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None:
        raise ValueError(f"--profile={text} must be a step such as 12, or steps such as 10-12")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last <= total:
        raise ValueError(f"--profile={text} must be steps from 1 to {total}, the earlier one first")
    return range(first, last + 1)


class StepTrace:
    """Writes what happens during some steps; a ``Hook`` of the training loop.

    Each process writes its own files. The first steps wait for the compiler, so later ones tell more.
    """

    def __init__(self, steps: range, folder: Path):
        """Takes the steps and the folder, which is made as the trace begins."""
        self._steps, self._folder = steps, folder
        self._running = contextlib.ExitStack()
        self._begun = False

    def before_step(self, state: Any, moment: StepTaken) -> None:
        """Begins the trace, if it is time, after all earlier steps have ended."""
        step = moment.global_step
        if not self._begun and step in self._steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running.callback(jax.profiler.stop_trace)
        elif not self._begun and step > self._steps[-1]:
            logger.warning("no trace: the run goes on after step %d, which --profile names", self._steps[-1])
        self._begun = self._begun or step >= self._steps[0]
        if step in self._steps:
            self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._mark.__enter__()

    def after_step(self, state: Any, metrics: Metrics, moment: StepTaken) -> Metrics:
        """Ends the trace after the last step, when its figures are there."""
        step = moment.global_step
        if step in self._steps:
            self._mark.__exit__(None, None, None)
        if step == self._steps[-1]:
            jax.block_until_ready((state, metrics))
            self.close()
            logger.info("trace of steps %d to %d: %s", self._steps[0], step, self._folder)
        return metrics

    def close(self) -> None:
        """Ends a trace that goes on, and writes it."""
        self._running.close()


@contextlib.contextmanager
def traced(steps: range | None, workdir: Path) -> Iterator[tuple[StepTrace, ...]]:
    """The hooks that trace these steps of a run, if any; a trace that ends early is written too."""
    if steps is None:
        yield ()
        return
    with contextlib.closing(StepTrace(steps, workdir / PROFILE)) as trace:
        yield (trace,)
