"""How far gates with a budget are open, by layer, by kind of question and by what a sample has.

Fusions that weigh modalities are asked for their weights instead, see ``modality_weights``.

Figures are of inference, where a look is open or closed: the share of samples that look in a layer, or the
mean share of their tokens that do. Beside them stand the rows that were computed: closed ones are left out,
but open ones are filled up to one of few sizes.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.batch import Batch
from vl_jax.evaluate.modality_weights import weight_use
from vl_jax.evaluate.task import Examinee, Matrix
from vl_jax.moe.stacks import RoutingState

_WORDS = {"kind": "kind of question", "modality": "what the sample has"}
_TITLE = "How open the gate is, by {}: % of {} that look at pictures in a layer"
_ROWS = "What the gate computed, of all {} in a layer, %"
_TOWER = "Samples whose pictures the tower read, of all samples, %"


def gate_use(
    examinee: Examinee, batches: Iterable[tuple[Sequence[Mapping[str, Any]], Batch]], kinds: Sequence[str]
) -> tuple[Matrix, ...]:
    """What the gates decide for every record of some batches; () of a model without gates.

    Args:
      batches: records, and the host batch whose first rows they are.
      kinds: fields of a record whose values are groups; an empty value is none.
    """
    model = examinee.layout.model
    if getattr(getattr(model.config, "fusion", None), "weighs", False):
        return weight_use(examinee, batches, kinds)
    budget = getattr(model.config, "budget", None)
    if budget is None:
        return ()
    use = GateUse((*kinds, "modality"), what="tokens" if budget.grain == "token" else "samples")
    for records, batch in batches:
        found = examinee.apply(_compiled(model), batch)
        whole = batch.tokens.size if budget.grain == "token" else batch.tokens.shape[0]
        use.update(records, found, whole, batch.tokens.shape[0])
    return use.matrices()


@functools.cache
def _compiled(model: nn.Module) -> Any:
    """How open the gate is by row and layer [B L], the rows each layer computed [L], and those that the tower
    read [1]; None: no gate ran."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> tuple[jax.Array, ...] | None:
        gates = model.apply(variables, batch, state).gates  # pyright: ignore[reportAttributeAccessIssue]
        if gates is None:
            return None
        return gates.decided.by_row.T, gates.decided.executed, jnp.asarray(gates.tower, jnp.float32)[None]

    return jax.jit(run)


class GateUse:
    """Adds up, batch by batch, how open gates are.

    Args:
      kinds: fields of a record by which it is grouped; ``modality`` says whether there was a picture.
      what: is decided on, "samples" or "tokens".
    """

    def __init__(self, kinds: Sequence[str], *, what: str):
        self._what, self._layers = what, 0
        self._sums: dict[str, dict[str, Any]] = {kind: defaultdict(lambda: 0.0) for kind in kinds}
        self._counts: dict[str, dict[str, int]] = {kind: defaultdict(int) for kind in kinds}
        self._executed: Any = 0.0
        self._whole = self._samples = 0
        self._read = 0.0  # samples that the tower read

    def update(
        self,
        records: Sequence[Mapping[str, Any]],
        found: tuple[Any, ...] | None,
        whole: int,
        samples: int,
    ) -> None:
        """Takes a batch.

        Args:
          found: how open each row is [B L], -1 where it has nothing to look at, the rows computed by layer
            [L], and the samples that the tower read [1]; None: no gate was run.
          whole: the rows, or tokens, of the batch.
          samples: the rows of the batch.
        """
        self._whole, self._samples = self._whole + whole, self._samples + samples
        if found is not None:
            self._read += float(np.sum(found[2]))
            self._layers = len(found[1])
            self._executed = self._executed + np.asarray(found[1], np.float64)
        for row, record in enumerate(records):
            value = None if found is None else np.asarray(found[0][row], np.float64)
            looks = value is not None and bool((value >= 0).all())
            record = {**record, "modality": "a picture" if looks else "no picture"}
            for kind, sums in self._sums.items():
                name = str(record.get(kind) or "")
                if name and (looks or kind == "modality"):
                    sums[name] = sums[name] + (value if looks else 0.0)
                    self._counts[kind][name] += 1

    def matrices(self) -> tuple[Matrix, ...]:
        """A table for every kind of group, one of rows that were computed, and one of those of the tower."""
        columns = tuple(f"layer {layer}" for layer in range(self._layers))
        zeros, tables = np.zeros(self._layers), []
        for kind, sums in self._sums.items():
            names = tuple(sorted(sums))
            if not names or not columns:
                continue
            values = [((zeros + sums[name]) / self._counts[kind][name]).tolist() for name in names]
            title = _TITLE.format(_WORDS.get(kind, kind), self._what)
            tables.append(Matrix(title, names, columns, values, _WORDS.get(kind, kind)))
        if columns:
            computed = ((zeros + self._executed) / self._whole).tolist()
            title = _ROWS.format("samples" if self._what == "samples" else "tokens, padding included,")
            tables.append(Matrix(title, ("computed",), columns, [computed]))
            tables.append(Matrix(_TOWER, ("read",), ("tower",), [[self._read / self._samples]]))
        return tuple(tables)
