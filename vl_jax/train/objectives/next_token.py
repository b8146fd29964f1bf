"""Next-token prediction: the cross-entropy of the tokens that a batch wants predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl_jax.batch import Batch
from vl_jax.train.objectives.objective import Sums


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The mean cross-entropy in nats over weighted targets, and the share of targets that are most likely.

    The model needs ``hidden`` in its output, and a method ``cross_entropy`` (see ``VisionLanguage``).
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
        output: Any = model.apply({"params": params}, batch, state.routing, rngs=rngs)
        predicting = jnp.take_along_axis(output.hidden, batch.target_index[..., None], axis=1)
        sums: Any = model.apply(
            {"params": params}, predicting, batch.targets, batch.loss_weights, method="cross_entropy"
        )
        routed = output.routed
        auxiliary = jnp.zeros(())
        if routed is not None:
            auxiliary = sum((jnp.sum(v) for v in routed.losses.values()), auxiliary)
        stats = None if routed is None else routed.stats
        return Sums({"loss": sums[0]}, {"accuracy": sums[1]}, auxiliary, stats)
