"""The protocol of objectives: what a stage minimises, as sums over rows.

    objective(params, state, rows) -> Sums      of some rows of the batch
    objective.total(batch)         -> totals    of the whole batch, by the same names

The step adds up sums over micro-batches and divides once, so neither accumulation nor sharding changes a
result. An objective is a frozen dataclass, hence a value in an experiment file; one of your own stands in a
file of yours (``path/to/file.py:Name``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from flax import struct

from vl_jax.batch import Batch
from vl_jax.moe.stacks import auxiliary_and_stats
from vl_jax.nn.still import moving
from vl_jax.params import Leaf


@struct.dataclass
class Sums:
    """What an objective says of some rows."""

    losses: dict[str, Leaf]  # f32[] each, summed over rows; gradients are of these
    metrics: dict[str, Leaf]  # f32[] each, summed over rows; logged only
    auxiliary: Leaf  # f32[] losses that are means over the rows, such as the balance of experts
    stats: dict[str, Any] = struct.field(default_factory=dict)  # statistics of routing by stack, summed
    collections: dict[str, Any] = struct.field(default_factory=dict)  # new values, by name
    gates: dict[str, Any] = struct.field(default_factory=dict)  # what fusion decided, see ``beside``


def variables(params: Any, state: Any) -> dict[str, Any]:
    """What a model is applied with: the parameters, and the collections of a ``TrainState``."""
    return {"params": params, **state.collections}


def apply(
    params: Any,
    state: Any,
    batch: Batch,
    *,
    model: nn.Module,
    rngs: dict[str, jax.Array] | None,
    method: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """What the model makes of some rows, and those of its collections that move: ``Sums.collections``.

    Args:
      method: of the model, of the arguments ``(batch, routing_state)``; None: its ``__call__``.
    """
    arguments, options = (variables(params, state), batch, state.routing), {"rngs": rngs, "method": method}
    if not state.collections:
        return model.apply(*arguments, **options), {}
    output, changed = model.apply(*arguments, **options, mutable=moving(state.collections))
    return output, dict(changed)


def beside(output: Any) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """What a model brings beside its predictions: auxiliary losses, statistics of routing, sums of gates.

    The latter are those of gates with a ``budget``, and of ``weights`` of modalities, where there are any.
    """
    auxiliary, stats = auxiliary_and_stats(output.routed)
    gates, weights = getattr(output, "gates", None), getattr(output, "weights", None)
    sums = {} if weights is None else {"weights": weights.sums()}
    if gates is None:
        return auxiliary, stats, sums
    return auxiliary + gates.loss, stats, sums | {"budget": gates.sums()}


@runtime_checkable
class Objective(Protocol):
    """What a stage minimises: the losses over their totals, weighted, and the auxiliary losses."""

    @property
    def couples_rows(self) -> bool:
        """Whether rows act on one another: then a batch cannot be cut into micro-batches."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """How much each loss counts, by its name."""
        ...

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        """What each sum of the batch is divided by, f32[] by the names of losses and metrics.

        Names may be those before the last slash: "kind" for "kind/loss" and "kind/accuracy".
        """
        ...

    def __call__(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array] | None
    ) -> Sums:
        """The sums of some rows.

        Args:
          params: all parameters, adapters merged.
          state: a ``TrainState``: its ``routing`` and ``collections`` are what a model needs besides.
        """
        ...
