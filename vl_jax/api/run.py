"""A run in memory: the experiment as it was trained, and its newest checkpoint on the devices here."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from vl_jax.data.encode import Encoder, make_encoder
from vl_jax.experiment import Experiment, model_spec
from vl_jax.layout import Layout
from vl_jax.report.results import read_result
from vl_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """The newest checkpoint of a run, and all that was needed to make it.

    Attributes:
      workdir: its folder.
      experiment: as it was trained.
      layout: its model (``layout.model``, a Flax module), and where parameters live.
      state: ``state.params``, adapters merged, and ``state.routing``.
      step: of the checkpoint.
    """

    workdir: Path
    experiment: Experiment
    layout: Layout
    state: TrainState
    step: int

    @property
    def params(self) -> Any:
        """The parameters, a tree of arrays."""
        return self.state.params

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """The evaluations of the newest step, by task, as ``eval/<task>/<step>.json`` holds them."""
        found = {}
        for task in sorted(self.workdir.glob("eval/*")):
            files = sorted((p for p in task.glob("*.json") if p.stem.isdigit()), key=lambda p: int(p.stem))
            if files:
                found[task.name] = read_result(files[-1])
        return found

    @functools.cached_property
    def encoder(self) -> Encoder:
        """What makes rows of the model out of samples; ``encoder.tokenizer`` is its tokenizer."""
        return make_encoder(self.experiment.data, model_spec(self.experiment))
