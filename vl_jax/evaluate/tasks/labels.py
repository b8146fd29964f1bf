"""Labels: what a classification head says of every sample, and which experts the classes go to."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Generator, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.batch import Batch
from vl_jax.evaluate.gates import gate_use
from vl_jax.evaluate.metrics.classification import LabelScores
from vl_jax.evaluate.metrics.detecting import DetectingScores
from vl_jax.evaluate.task import Examinee, Findings, Grouped, Matrix, Record
from vl_jax.moe import stacks
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.stacks import RoutingState

_SHARES = ("accuracy", "balanced_accuracy", "macro_f1")
_DETECTED = ("auroc", "false_alarms_95")
_MOST_ROWS = 40  # of a matrix that is shown

Load = dict[tuple[str, str, str], np.ndarray]  # [L E] choices by stack, kind of group and name of group


@dataclasses.dataclass(frozen=True)
class Labels:
    """The class of every sample; by the groups of the record, such as its language.

    With ``positive`` it is also measured how well that class is told from all others, whatever the threshold:
    AUROC, and the share of false alarms where 95 % of the class are found.
    """

    head: str = "label"  # empty: that of each source, the first one that its first samples have a label of
    headline: str = "accuracy"
    positive: str = ""  # the class that is to be detected; empty: none
    groups: tuple[str, ...] = ("language",)  # fields of a record, labels included, whose values are groups

    def __post_init__(self):
        known = (*_SHARES, *(_DETECTED if self.positive else ()))
        if self.headline not in known:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(known)}")

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; samples without a label are left out.

        Raises:
          ValueError: the model has no such head, or no sample has a label.
        """
        model = examinee.layout.model
        head = model.config.head(self.head or _labelled(examinee))
        if self.positive and self.positive not in head.classes:
            known = ", ".join(head.classes)
            raise ValueError(f"positive={self.positive!r}: no class of head {head.name!r}; it has {known}")
        grouped = Grouped(lambda: _metric(head.classes, self.positive), self.groups)
        overall = LabelScores(head.classes)
        load: Load = defaultdict(lambda: np.zeros(()))
        for records, batch in examinee.samples():
            scores, chosen = examinee.apply(_compiled(model, head.name), batch)
            label = batch.labels[head.name]
            for row, record in enumerate(records):
                if not label.present[row]:
                    continue
                truth, said = int(label.values[row]), int(np.argmax(scores[row]))
                record = {**record, **record["labels"]}
                grouped.update(record, truth, said, **({"scores": scores[row]} if self.positive else {}))
                overall.update(truth, said)
                kinds = {"class": head.classes[truth], **{k: str(record.get(k) or "") for k in self.groups}}
                for (kind, name), (stack, counts) in itertools.product(kinds.items(), chosen.items()):
                    if name:
                        load[stack, kind, name] = load[stack, kind, name] + counts[:, row]
                yield {
                    "id": record["id"],
                    "question": record["question"],
                    "answer": head.classes[truth],
                    "prediction": head.decode(scores[row]),
                    "correct": truth == said,
                    "image": record["image"],
                    **{name: str(record.get(name) or "") for name in self.groups},
                }
        names = (*_SHARES, *(f"majority_{name}" for name in _SHARES), *_DETECTED)
        matrices = (*_confusion(overall, head.classes), *_loads(load, head.classes, model))
        gates = gate_use(examinee, examinee.samples(), self.groups)
        return grouped.findings(shares=names, matrices=(*matrices, *gates))


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """The head's scores [B K], and by stack how many tokens of each row chose each expert [L B E]."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        output, kept = model.apply(variables, batch, state, mutable=["intermediates"])
        rows, chosen = batch.tokens.shape[0], {}
        ran = {n: s for n, s in model.config.stacks.items() if n in output.routed}  # pyright: ignore
        for name, stack in ran.items():
            layers = stacks.sown(kept["intermediates"], stack)
            if all(isinstance(layer.assignment, TokenChoice) for layer in layers):
                counts = [_choices(layer.assignment.experts, stack.moe.num_experts) for layer in layers]
                chosen[name] = jnp.stack(counts).reshape(len(layers), rows, -1, stack.moe.num_experts).sum(2)
        return output.predictions[head], chosen

    return jax.jit(run)


def _choices(experts: jax.Array, num_experts: int) -> jax.Array:
    """How many tokens of each routing group chose each expert: [G T K] to [G E]; E itself is no choice."""
    return jax.nn.one_hot(experts, num_experts).sum(axis=(1, 2))


def _metric(classes: tuple[str, ...], positive: str) -> LabelScores | DetectingScores:
    return DetectingScores(classes, positive) if positive else LabelScores(classes)


def _labelled(examinee: Examinee) -> str:
    """The first head of classes that one of the first samples has a label of.

    Raises:
      ValueError: there is none.
    """
    batch = next((batch for _, batch in examinee.samples()), None)
    if batch is None:
        raise ValueError(f"source {examinee.source!r}: none of its samples can be read; the log says why")
    heads = [head.name for head in examinee.layout.model.config.heads if hasattr(head, "classes")]
    found = [name for name in heads if np.any(batch.labels[name].present)]
    if not found:
        known = ", ".join(heads) or "a head of classes"
        raise ValueError(f"source {examinee.source!r}: its first samples have no label of {known}")
    return found[0]


def _confusion(overall: LabelScores, classes: tuple[str, ...]) -> tuple[Matrix, ...]:
    if len(classes) > _MOST_ROWS:
        return ()
    confusion = _shares(overall.confusion).tolist()
    return (Matrix("Confusion", classes, classes, confusion, "class", "called"),)


def _loads(load: Load, classes: tuple[str, ...], model: Any) -> Iterator[Matrix]:
    """By layer and by kind of group, the experts that its samples went to."""
    for stack, kind in dict.fromkeys((stack, kind) for stack, kind, _ in load):
        found = {name: counts for (s, k, name), counts in load.items() if (s, k) == (stack, kind)}
        names = classes if kind == "class" else tuple(sorted(found))
        if len(names) > _MOST_ROWS:
            continue
        absent = np.zeros_like(next(iter(found.values())))
        counts = np.stack([found.get(name, absent) for name in names], axis=1)  # [L K E]
        for layer, of_layer in zip(model.config.stacks[stack].layers, counts, strict=True):
            experts = tuple(str(e) for e in range(of_layer.shape[-1]))
            title = f"Experts of {stack}, layer {layer}, by {kind}"
            yield Matrix(title, names, experts, _shares(of_layer).tolist(), kind, "expert")


def _shares(counts: np.ndarray) -> np.ndarray:
    """Every row divided by its sum."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
