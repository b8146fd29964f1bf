"""Labels: what a classification head says of every sample, and which experts the classes go to."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.batch import Batch
from vl_jax.evaluate.gates import gate_use
from vl_jax.evaluate.metrics.classification import LabelScores
from vl_jax.evaluate.task import Examinee, Findings, Grouped, Matrix, Record
from vl_jax.moe import stacks
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.stacks import RoutingState

_SHARES = ("accuracy", "balanced_accuracy", "macro_f1")
_MOST_CLASSES = 40  # of which a matrix is shown


@dataclasses.dataclass(frozen=True)
class Labels:
    """The class of every sample; by the groups of the record, such as its language."""

    head: str = "label"
    headline: str = "accuracy"
    groups: tuple[str, ...] = ("language",)  # fields of a record, labels included, whose values are groups

    def __post_init__(self):
        if self.headline not in _SHARES:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(_SHARES)}")

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; samples without a label are left out.

        Raises:
          ValueError: the model has no such head, or no sample has a label.
        """
        model = examinee.layout.model
        head = model.config.head(self.head)
        grouped = Grouped(lambda: LabelScores(head.classes), self.groups)
        overall = LabelScores(head.classes)
        load: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(()))
        for records, batch in examinee.samples():
            scores, chosen = examinee.apply(_compiled(model, self.head), batch)
            label = batch.labels[self.head]
            for row, record in enumerate(records):
                if not label.present[row]:
                    continue
                truth, said = int(label.values[row]), int(np.argmax(scores[row]))
                record = {**record, **record["labels"]}
                grouped.update(record, truth, said)
                overall.update(truth, said)
                of_class = np.eye(len(head.classes))[truth]
                for stack, counts in chosen.items():  # [L B E] to [L K E]
                    load[stack] = load[stack] + of_class[None, :, None] * counts[:, row, None]
                yield {
                    "id": record["id"],
                    "question": record["question"],
                    "answer": head.classes[truth],
                    "prediction": head.decode(scores[row]),
                    "correct": truth == said,
                    "image": record["image"],
                    **{name: str(record.get(name) or "") for name in self.groups},
                }
        names = (*_SHARES, *(f"majority_{name}" for name in _SHARES))
        matrices = _matrices(overall, head, load, model)
        gates = gate_use(examinee, examinee.samples(), self.groups)
        return grouped.findings(shares=names, matrices=(*matrices, *gates))


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """The head's scores [B K], and by stack how many tokens of each row chose each expert [L B E]."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        output, kept = model.apply(variables, batch, state, mutable=["intermediates"])
        rows, chosen = batch.tokens.shape[0], {}
        for name, stack in model.config.stacks.items():  # pyright: ignore[reportAttributeAccessIssue]
            layers = stacks.sown(kept["intermediates"], stack)
            if all(isinstance(layer.assignment, TokenChoice) for layer in layers):
                counts = [_choices(layer.assignment.experts, stack.moe.num_experts) for layer in layers]
                chosen[name] = jnp.stack(counts).reshape(len(layers), rows, -1, stack.moe.num_experts).sum(2)
        return output.predictions[head], chosen

    return jax.jit(run)


def _choices(experts: jax.Array, num_experts: int) -> jax.Array:
    """How many tokens of each routing group chose each expert: [G T K] to [G E]; E itself is no choice."""
    return jax.nn.one_hot(experts, num_experts).sum(axis=(1, 2))


def _matrices(overall: LabelScores, head: Any, load: dict[str, np.ndarray], model: Any) -> tuple[Matrix, ...]:
    classes = head.classes
    if len(classes) > _MOST_CLASSES:
        return ()
    confusion = _shares(overall.confusion)
    found = [Matrix("Confusion", classes, classes, confusion.tolist(), "class", "called")]
    for name, counts in load.items():
        for layer, of_layer in zip(model.config.stacks[name].layers, counts, strict=True):
            experts = tuple(str(e) for e in range(of_layer.shape[-1]))
            title = f"Experts of {name}, layer {layer}, by class"
            found.append(Matrix(title, classes, experts, _shares(of_layer).tolist(), "class", "expert"))
    return tuple(found)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Every row divided by its sum."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
