"""PCGrad: of two gradients that work against one another, each loses what works against the other.

    g_i -= (g_i . g_j / |g_j|^2) g_j   for every other j in random order, where g_i . g_j < 0

(Yu et al. 2020, arXiv 2001.06782, algorithm 1). Every result is a weighted sum of the gradients as they were,
so the products of these are all that is needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.train.updates.fusing import At, Facts, GroupWeights


@dataclasses.dataclass(frozen=True)
class PCGrad:
    """Projects conflicting gradients; over all that trains at once."""

    at: At = "update"

    def init(self, names: tuple[str, ...]) -> dict[str, Any]:
        """It remembers nothing."""
        return {}

    def __call__(self, facts: Facts, state: dict[str, Any]) -> tuple[GroupWeights, dict[str, Any]]:
        """The weights of the sum of the projected gradients."""
        count = len(facts.names)
        keys = jax.random.split(facts.key, count)
        order = jnp.stack([jax.random.permutation(key, count) for key in keys])
        weights = jnp.sum(projected(facts.gram, order), axis=0)
        shown = {f"gradients/{name}/weight": weights[i] for i, name in enumerate(facts.names)}
        return GroupWeights(facts.everywhere(weights), figures=shown), state


def projected(gram: Float[Array, "G G"], order: Int[Array, "G G"]) -> Float[Array, "G G"]:
    """Every projected gradient as a weighted sum of the gradients: a row of weights each.

    Args:
      gram: products of the gradients with one another.
      order: for each gradient, the order in which it meets the others.
    """

    def one(i: int) -> Float[Array, " G"]:
        row = jnp.eye(len(gram), dtype=gram.dtype)[i]
        for step in range(len(gram)):
            j = order[i, step]
            product, square = row @ gram[:, j], gram[j, j]
            against = (j != i) & (product < 0) & (square > 0)
            share = jnp.where(against, product / jnp.where(square > 0, square, 1.0), 0.0)
            row = row.at[j].add(-share)
        return row

    return jnp.stack([one(i) for i in range(len(gram))])
