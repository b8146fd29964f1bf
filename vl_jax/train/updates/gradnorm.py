"""GradNorm: weights of groups that are learned, so that none that is behind has a small gradient.

    w_i |g_i|  is drawn to  mean_j(w_j |g_j|) * r_i^alpha,   r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0))

(Chen et al. 2018, arXiv 1711.02257, equations 1 and 2). GroupWeights take steps down the sum of the distances
between the two sides, and then are scaled to a mean of 1. Distances are divided by the mean norm here, so
that ``rate`` does not depend on how large gradients are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.train.updates.fusing import At, Facts, GroupWeights

_LEAST = 1e-3  # that a weight is


@dataclasses.dataclass(frozen=True)
class GradNorm:
    """Balances the norms of the groups' gradients by how quickly their losses fall."""

    alpha: float = 1.5  # how strongly groups that are behind are pulled; 0: norms are made alike
    rate: float = 0.025  # of the steps of the weights
    modules: tuple[str, ...] = ()  # top-level modules whose gradients are compared; empty: all that train
    at: At = "update"

    def __post_init__(self):
        if self.alpha < 0 or self.rate <= 0:
            raise ValueError(f"alpha={self.alpha} must be >= 0, rate={self.rate} > 0")

    def init(self, names: tuple[str, ...]) -> dict[str, Any]:
        """GroupWeights of 1, and no losses yet."""
        return {"weights": jnp.ones(len(names)), "first": jnp.zeros(len(names))}

    def __call__(self, facts: Facts, state: dict[str, Any]) -> tuple[GroupWeights, dict[str, Any]]:
        """The weights after this step's own step."""
        unknown = [name for name in self.modules if name not in facts.grams]
        if unknown:
            known = ", ".join(facts.grams)
            raise ValueError(f"gradients.modules={self.modules}: {unknown[0]!r} does not train; {known} do")
        chosen = {name: facts.grams[name] for name in self.modules} or facts.grams
        gram = dataclasses.replace(facts, grams=chosen).gram
        first = jnp.where(jnp.any(state["first"] != 0), state["first"], facts.losses)
        weights = stepped(
            state["weights"], jnp.sqrt(jnp.diagonal(gram)), facts.losses / first, self.alpha, self.rate
        )
        shown = {f"gradients/{name}/weight": weights[i] for i, name in enumerate(facts.names)}
        return GroupWeights(facts.everywhere(weights), figures=shown), {"weights": weights, "first": first}


def stepped(
    weights: Float[Array, " G"],
    norms: Float[Array, " G"],
    fallen: Float[Array, " G"],
    alpha: float,
    rate: float,
) -> Float[Array, " G"]:
    """The weights after one step.

    Args:
      norms: of the groups' gradients, without weights.
      fallen: losses as shares of the first ones.
    """
    mean = jnp.maximum(jnp.mean(weights * norms), 1e-12)
    wanted = (fallen / jnp.mean(fallen)) ** alpha
    slope = jnp.sign(weights * norms / mean - wanted) * norms / mean
    moved = jnp.maximum(weights - rate * slope, _LEAST)
    return moved / jnp.mean(moved)
