"""A model is examined while it trains: the loss on held-out sources, and the scores of the run's task."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from vl_jax.batch import Batch
from vl_jax.layout import Layout, put_batch
from vl_jax.nn.still import resting
from vl_jax.runtime.ledger import Ledger
from vl_jax.runtime.spent import EVALUATION
from vl_jax.train import lora
from vl_jax.train.hooks import Moment
from vl_jax.train.objectives.objective import Objective
from vl_jax.train.stages import Stage
from vl_jax.train.step import Metrics, TrainState, total_of
from vl_jax.train.updates import average

Examine = Callable[[str, TrainState, int], Mapping[str, float | None]]
HeldOut = Callable[[str, Stage], Iterable[Batch]]


class EvaluationHook:
    """Logs ``eval/<source>/loss`` and ``eval/<source>/<score>`` every so many steps; a ``Hook``."""

    def __init__(
        self,
        layout: Layout,
        sources: Iterable[str],
        *,
        every: int,
        held_out: HeldOut,
        examine: Examine,
        ledger: Ledger,
        averaged: bool = False,
    ):
        """Takes what to look at.

        Args:
          sources: names of held-out sources.
          every: steps from one examination to the next; one is made as a stage ends, too.
          held_out: batches of a source as a stage reads them; the loss is of these.
          examine: the scores of a source from a state without adapters, after a step of the run.
          ledger: of the run, which is told how long it takes.
          averaged: looks at the average of what trains, in stages that keep one.
        """
        self._averaged = averaged
        self._ledger = ledger
        self._layout, self._sources, self._every = layout, tuple(sources), every
        self._held_out, self._examine = held_out, examine
        self._compiled: list[tuple[Objective, Callable]] = []
        merge = functools.partial(lora.merge, roles=layout.roles)
        self._merge = jax.jit(merge, static_argnames=("scale", "only"))

    def before_step(self, state: TrainState, moment: Moment) -> None:
        """Does nothing: what counts is the state after the step."""

    def after_step(self, state: TrainState, metrics: Metrics, moment: Moment) -> Metrics:
        """Adds what it finds, if it is time."""
        if not moment.is_due(self._every):
            return metrics
        jax.block_until_ready(state)  # What the step takes is the step's.
        with self._ledger.spend(EVALUATION):
            return metrics | self._found(state, moment)

    def _found(self, state: TrainState, moment: Moment) -> dict[str, np.float64]:
        """The loss and the scores of every source."""
        stage, found = moment.stage, dict[str, np.float64]()
        if self._averaged and stage.optimizer.average:
            state = average.averaged(state, stage.optimizer.average)
        if stage.lora is not None:
            params = self._merge(state.params, state.adapters, scale=stage.lora_scale, only=stage.lora_only)
            state = dataclasses.replace(state, params=params, adapters={})
        for source in self._sources:
            loss = self._loss(source, stage, state)
            scores = self._examine(source, state, moment.global_step)
            values = {"loss": loss, **scores}
            found |= {
                f"eval/{source}/{name}": np.float64(np.nan if value is None else value)
                for name, value in values.items()
            }
        return found

    def _loss(self, source: str, stage: Stage, state: TrainState) -> float:
        """The weighted loss over all samples of a source; not a number if none has a target."""
        sums_of, losses, totals = self._sums_of(stage.objective), Counter(), Counter()
        for batch in self._held_out(source, stage):
            found = jax.device_get(sums_of(state, put_batch(batch, self._layout)))
            for kept, sums in zip((losses, totals), found, strict=True):
                kept.update({name: float(value) for name, value in sums.items()})
        if not losses or not all(totals.values()):
            return float("nan")
        return sum(stage.objective.weights[name] * losses[name] / totals[name] for name in losses)

    def _sums_of(self, objective: Objective) -> Callable:
        """``held_out_sums`` of an objective, compiled once."""
        for known, compiled in self._compiled:
            if known == objective:
                return compiled
        compiled = jax.jit(functools.partial(held_out_sums, objective=objective, model=self._layout.model))
        self._compiled.append((objective, compiled))
        return compiled


def held_out_sums(
    state: TrainState, batch: Batch, *, objective: Objective, model: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Every loss of some rows as a sum, and what it is divided by, by the same names; f32[] each.

    Collections are taken as they are: what has running statistics is normalised by these.
    """
    state = dataclasses.replace(state, collections=resting(state.collections, lambda _: True))
    found = objective(state.params, state, batch, model=model, rngs=None)
    totals = objective.total(batch)
    return found.losses, {name: total_of(name, totals) for name in found.losses}
