"""What a run has spent: its flops so far, logged beside the loss, so that runs compare at equal cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from vl_jax import sharding
from vl_jax.experiment import Experiment, example_batch, plan
from vl_jax.fit.flops import STEP_PASSES, countable, forward_flops
from vl_jax.train.hooks import Moment
from vl_jax.train.step import Metrics, TrainState


class Spent:
    """Adds ``flops``: what products the steps so far took, counted from shapes; a ``Hook``."""

    def __init__(self, experiment: Experiment):
        """Counts the stages of a resolved experiment; nothing is computed."""
        plain = countable(experiment)
        layout = plan(plain)
        example = example_batch(plain, sharding.batch_axes(layout.mesh))
        self._before: dict[str, float] = {}  # when a stage begins, by its name
        self._step: dict[str, float] = {}
        total, known = 0.0, dict[Any, float]()
        for stage in plain.stages:
            key = (stage.objective, stage.batch_size)
            if key not in known:
                known[key] = STEP_PASSES * forward_flops(layout, stage, example)
            self._before[stage.name], self._step[stage.name] = total, known[key]
            total += stage.steps * known[key]

    def before_step(self, state: TrainState, moment: Moment) -> None:
        """Nothing."""

    def after_step(self, state: TrainState, metrics: Metrics, moment: Moment) -> Metrics:
        """Adds the sum up to this step."""
        name = moment.stage.name
        return {**metrics, "flops": np.float64(self._before[name] + moment.step * self._step[name])}
