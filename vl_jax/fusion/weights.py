"""How much each modality counts in what a fusion makes of a row, and what a run logs of that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from vl_jax.params import Leaf


@struct.dataclass
class ModalityWeights:
    """The weights of the modalities of some rows."""

    values: Leaf  # f32[B N]
    present: Leaf  # bool[B N] whether the row has the modality
    names: tuple[str, ...] = struct.field(pytree_node=False)  # of the N modalities

    def sums(self) -> dict[str, Any]:
        """What a step adds up over its micro-batches; see ``summarize``."""
        here = self.present.astype(jnp.float32)
        values = jax.lax.stop_gradient(self.values) * here
        return {n: (jnp.sum(values[:, i]), jnp.sum(here[:, i])) for i, n in enumerate(self.names)}


def summarize(sums: dict[str, Any]) -> dict[str, jax.Array]:
    """The figures of the log: the mean weight of each modality over the rows that have it."""
    return {f"gate/weight/{name}": total / jnp.maximum(rows, 1.0) for name, (total, rows) in sums.items()}
