"""What stands around the steps of a run without being part of them: hooks, called on the host.

What changes the step itself, such as a loss on mixed rows, is a wrapper of it: see ``step.StepWrapper``.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

from vl_jax.train.stages import Stage
from vl_jax.train.step import Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class Moment:
    """The step that a run is about to take, or has just taken."""

    stage: Stage
    step: int  # within the stage, from 1
    global_step: int

    def is_due(self, every: int) -> bool:
        """Whether something happens here that happens every so many steps, and as a stage ends."""
        return self.global_step % every == 0 or self.step == self.stage.steps


@runtime_checkable
class Hook(Protocol):
    """Is called before and after every step, under the mesh of the run, by all of its processes."""

    def before_step(self, state: TrainState, moment: Moment) -> None:
        """Looks at the state that the step will consume."""
        ...

    def after_step(self, state: TrainState, metrics: Metrics, moment: Moment) -> Metrics:
        """The metrics of the step, as they are logged; a hook may add some."""
        ...
