"""How much each modality counts, by the groups of a record: its kind of question, its language, a label.

A figure is the mean weight of a modality over the samples of a group that have it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vl_jax.batch import Batch
from vl_jax.evaluate.task import Examinee, Matrix
from vl_jax.moe.stacks import RoutingState

_TITLE = "How much each modality counts, by {}: mean weight over samples that have it, %"
_WORDS = {"kind": "kind of question", "modality": "what the sample has"}
_MOST_ROWS = 40  # of a table


def weight_use(
    examinee: Examinee, batches: Iterable[tuple[Sequence[Mapping[str, Any]], Batch]], kinds: Sequence[str]
) -> tuple[Matrix, ...]:
    """Tables of the weights of every record of some batches.

    Args:
      batches: records, and the host batch whose first rows they are.
      kinds: fields of a record, or of its labels, whose values are groups; an empty value is none.
    """
    use = WeightUse((*kinds, "modality"))
    for records, batch in batches:
        use.update(records, examinee.apply(_compiled(examinee.layout.model), batch))
    return use.matrices()


@functools.cache
def _compiled(model: nn.Module) -> Any:
    """By modality the weight of each row, and whether the row has it: [B] each."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = model.apply(variables, batch, state).weights  # pyright: ignore[reportAttributeAccessIssue]
        if found is None:
            return {}
        return {n: (found.values[:, i], found.present[:, i]) for i, n in enumerate(found.names)}

    return jax.jit(run)


class WeightUse:
    """Adds up weights, batch by batch; ``modality`` among the kinds is what a record has."""

    def __init__(self, kinds: Sequence[str]):
        self._kinds = tuple(dict.fromkeys(kinds))
        # By kind and name of a group, and by modality: the sum of weights, and of samples.
        self._sums: dict[tuple[str, str], dict[str, np.ndarray]] = defaultdict(dict)

    def update(self, records: Sequence[Mapping[str, Any]], found: Mapping[str, tuple[Any, Any]]) -> None:
        """Takes a batch.

        Args:
          found: by modality the weight of each row [B], and whether the row has it [B].
        """
        for row, record in enumerate(records):
            here = {name: float(weights[row]) for name, (weights, has) in found.items() if has[row]}
            record = {**record, **record.get("labels", {}), "modality": " + ".join(here)}
            for kind in self._kinds:
                group = str(record.get(kind) or "")
                for name, weight in here.items() if group else ():
                    sums = self._sums[kind, group].setdefault(name, np.zeros(2))
                    sums += (weight, 1.0)

    def matrices(self) -> tuple[Matrix, ...]:
        """A table for every kind of group, with a column for every modality."""
        tables = []
        columns = tuple(dict.fromkeys(name for of in self._sums.values() for name in of))
        for kind in self._kinds:
            groups = sorted(group for of, group in self._sums if of == kind)
            if not groups or len(groups) > _MOST_ROWS:
                continue
            values = [[_mean(self._sums[kind, group].get(name)) for name in columns] for group in groups]
            word = _WORDS.get(kind, kind)
            tables.append(Matrix(_TITLE.format(word), tuple(groups), columns, values, word, "modality"))
        return tuple(tables)


def _mean(sums: np.ndarray | None) -> float:
    return 0.0 if sums is None else float(sums[0] / sums[1])
