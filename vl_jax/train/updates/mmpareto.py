"""MMPareto: in every encoder, a direction that serves the joint loss and that of its own modality.

    cos(joint, own) > 0:  g = joint + own
    else:                 g = 2 (w joint + (1 - w) own), the shortest such sum

and it is made as long as ``joint + own`` if it is shorter, times ``gamma`` (Wei and Hu 2024, arXiv
2405.17730, as their code has it). The modules of the encoders are named as the groups are; in all others the
plain sum stays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.train.updates.fusing import At, Facts, GroupWeights
from vl_jax.train.updates.modality import own_modules


@dataclasses.dataclass(frozen=True)
class MMPareto:
    """Of a joint loss and losses of single modalities; what is no group's own counts as joint."""

    gamma: float = 1.5  # how much longer the result is made
    at: At = "update"

    def __post_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be > 0")

    def init(self, names: tuple[str, ...]) -> dict[str, Any]:
        """It remembers nothing."""
        return {}

    def __call__(self, facts: Facts, state: dict[str, Any]) -> tuple[GroupWeights, dict[str, Any]]:
        """In each modality's module, a weight for its own group and one for all others."""
        weights, shown = facts.everywhere(jnp.ones(len(facts.names))), {}
        for module in own_modules(facts, type(self).__name__):
            own = jnp.asarray([name == module for name in facts.names])
            gram, sides = facts.grams[module], jnp.stack([~own, own]).astype(jnp.float32)
            joint, single = balanced(sides @ gram @ sides.T, self.gamma)
            weights[module] = jnp.where(own, single, joint)
            shown |= {f"gradients/{module}/weight": single, f"gradients/{module}/joint_weight": joint}
        return GroupWeights(weights, figures=shown), state


def balanced(gram: Float[Array, "2 2"], gamma: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weights of a joint gradient and a modality's own, from their products with one another."""
    share = jnp.where(gram[0, 1] > 0, 0.5, nearest(gram))
    weights = 2.0 * jnp.stack([share, 1.0 - share])
    length = jnp.sqrt(jnp.maximum(weights @ gram @ weights, 0.0))
    plain = jnp.sqrt(jnp.maximum(jnp.sum(gram), 0.0))
    stretch = jnp.where(length > 0, jnp.maximum(plain / jnp.where(length > 0, length, 1.0), 1.0), 1.0)
    weights = gamma * stretch * weights
    return weights[0], weights[1]


def nearest(gram: Float[Array, "2 2"]) -> Float[Array, ""]:
    """The share of the first of two vectors in their shortest mean (arXiv 1810.04650, equation 4)."""
    square = gram[0, 0] - 2.0 * gram[0, 1] + gram[1, 1]  # of their difference
    share = (gram[1, 1] - gram[0, 1]) / jnp.where(square > 0, square, 1.0)
    return jnp.where(square > 0, jnp.clip(share, 0.0, 1.0), 0.5)
