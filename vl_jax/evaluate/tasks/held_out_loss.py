"""Held-out loss: what a stage minimises, on samples that it never saw, by what the samples consist of."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Generator
from typing import Any, Literal

import jax
import numpy as np

from vl_jax.data.sample import Sample
from vl_jax.data.stream.held_out_batches import held_out_groups
from vl_jax.evaluate.gates import gate_use
from vl_jax.evaluate.task import Examinee, Findings, Matrix, Record
from vl_jax.train.evaluation import held_out_sums
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.objectives.objective import Objective
from vl_jax.train.objectives.together import AnyObjective
from vl_jax.train.step import TrainState

Sums = tuple[Counter, Counter]  # losses, and what they are divided by
_GATED_QUESTIONS = 256  # of a source, for which gates with a budget are looked at


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """The loss of an objective over a source, by the modalities that a sample has.

    Nothing is generated, so it costs a small part of what answers cost, and it tells runs apart that answer
    equally well. Samples are read as a training stage reads them; each is counted once.
    """

    objective: AnyObjective = NextToken()
    targets: Literal["all", "answers"] = "answers"  # which text tokens are predicted

    @property
    def headline(self) -> str:
        """The weighted loss."""
        return "loss"

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; there are no records.

        Raises:
          ValueError: nothing in the source has a target.
        """
        state = TrainState(
            np.zeros((), np.int32),
            examinee.params,
            None,
            examinee.routing_state,
            collections=dict(examinee.collections),
        )
        by_group: dict[str, Sums] = defaultdict(lambda: (Counter(), Counter()))
        compiled = _compiled(self.objective, examinee.layout.model)
        extent = examinee.extent
        batches = held_out_groups(
            *(examinee.data, examinee.spec, examinee.source),
            group_of=modalities,
            targets=self.targets,
            batch_size=extent.batch_size,
            limit=extent.limit,
        )
        for group, batch in batches:
            examinee.alive()
            found = examinee.apply(functools.partial(_with_state, compiled, state), batch)
            for kept, sums in zip(by_group[group], found, strict=True):
                kept.update({name: float(value) for name, value in sums.items()})
        whole: Sums = (Counter(), Counter())
        for sums in by_group.values():
            for kept, part in zip(whole, sums, strict=True):
                kept.update(part)
        if not whole[0] or not all(whole[1].values()):
            raise ValueError(f"source {examinee.source!r}: nothing in it has a target, so it has no loss")
        groups = {name: self._scores(sums) for name, sums in sorted(by_group.items())}
        yield from ()
        by_modality = {"modality": groups} if len(groups) > 1 else {}
        return Findings(self._scores(whole), by_modality, matrices=_gates(examinee))

    def _scores(self, sums: Sums) -> dict[str, float]:
        losses, totals = sums
        means = {name: losses[name] / totals[name] if totals[name] else math.nan for name in losses}
        loss = sum(self.objective.weights[name] * mean for name, mean in means.items())
        return {"loss": loss, **({} if set(means) == {"loss"} else means)}


def _gates(examinee: Examinee) -> tuple[Matrix, ...]:
    """How open the gates of a model with a budget are for the first questions of the source."""
    most = min(examinee.extent.limit or _GATED_QUESTIONS, _GATED_QUESTIONS)
    examinee = dataclasses.replace(examinee, extent=dataclasses.replace(examinee.extent, limit=most))
    batches = examinee.samples() if examinee.spec.reads == "text" else examinee.prompts()
    return gate_use(examinee, batches, ("kind", "language"))


def modalities(sample: Sample) -> str:
    """What a sample has besides its text."""
    return "image" if sample.images else "text"


@functools.cache
def _compiled(objective: Objective, model: Any) -> Any:
    return jax.jit(functools.partial(held_out_sums, objective=objective, model=model))


def _with_state(compiled: Any, state: TrainState, variables: Any, routing: Any, batch: Any) -> Any:
    return compiled(state, batch)
