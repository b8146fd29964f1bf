"""Next-token prediction: the cross-entropy of the tokens that a batch wants predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl_jax.batch import Batch
from vl_jax.train.objectives.objective import Sums, apply, beside, variables


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The mean cross-entropy in nats over weighted targets, and the share of targets that are most likely.

    The model needs ``hidden`` in its output, and a method ``cross_entropy`` (see ``model``).
    """

    @property
    def couples_rows(self) -> bool:
        """No row acts on another."""
        return False

    @property
    def weights(self) -> Mapping[str, float]:
        """The one loss."""
        return {"loss": 1.0}

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        """The weight of all targets."""
        total = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        return {"loss": total, "accuracy": total}

    def __call__(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array] | None
    ) -> Sums:
        """The sums of some rows: cross-entropy, hits, auxiliary losses over layers, routing statistics."""
        output, collections = apply(params, state, batch, model=model, rngs=rngs)
        predicting = jnp.take_along_axis(output.hidden, batch.target_index[..., None], axis=1)
        sums: Any = model.apply(
            variables(params, state), predicting, batch.targets, batch.loss_weights, method="cross_entropy"
        )
        auxiliary, stats, gates = beside(output)
        return Sums({"loss": sums[0]}, {"accuracy": sums[1]}, auxiliary, stats, collections, gates)
