"""Transcripts: what a head hears in every sound, against what is said in it, as error rates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vl_jax.batch import Batch
from vl_jax.evaluate.metrics.text.error_rate import ErrorRate
from vl_jax.evaluate.task import Compared, Examinee, Findings, Grouped, Record
from vl_jax.moe.stacks import RoutingState


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """The likeliest symbols of every sound, compared by letters and by words."""

    head: str = "transcript"
    headline: str = "cer"
    metrics: tuple[ErrorRate, ...] = (ErrorRate("cer", "character"), ErrorRate())
    groups: tuple[str, ...] = ("language",)  # fields of a record, labels included, whose values are groups

    def __post_init__(self):
        names = [metric.name for metric in self.metrics]
        if self.headline not in names or len(set(names)) < len(names):
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(names)}, all different")

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; samples without a text are left out.

        Raises:
          ValueError: the model has no such head, or no sample has a text.
          UserError: jiwer is not installed.
        """
        model, count = examinee.layout.model, 0
        head = model.config.head(self.head)
        grouped = Grouped(lambda: Compared(self.metrics), self.groups)
        for records, batch in examinee.samples():
            said = examinee.apply(_compiled(model, self.head), batch)
            label = batch.labels[self.head]
            for row, record in enumerate(records):
                truth = head.text_of(np.asarray(label.values[row])) if label.present[row] else ""
                if not truth.strip():
                    continue
                heard = head.decode(jax.tree.map(lambda x, i=row: np.asarray(x[i]), said))
                grouped.update({**record, **record["labels"]}, truth, heard)
                count += 1
                yield {
                    "id": record["id"],
                    "question": record["question"],
                    "answer": truth,
                    "prediction": heard,
                    "correct": truth == heard,
                    "image": record["image"],
                }
        if not count:
            raise ValueError(f"source {examinee.source!r}: no sample has a text for head {self.head!r}")
        return grouped.findings()


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """The scores of every symbol at every token."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> Any:
        output: Any = model.apply(variables, batch, state)
        return output.predictions[head]

    return jax.jit(run)
