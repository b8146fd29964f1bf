"""OGM-GE: the encoder of the modality that is ahead learns more slowly, and noise is added.

    rho_u = score of u / score of the others     k_u = 1 - tanh(alpha rho_u) where rho_u > 1, else 1

The score of a modality is the mean probability that its own head gives the right class (Peng et al. 2022,
arXiv 2203.15332, equations 8 to 11, with ``tanh(alpha rho)`` as their code has it). There it is read off the
joint head. Theirs acts on convolutions alone; here on all that the encoder has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.train.updates.fusing import PROBABILITY, At, Facts, GroupWeights
from vl_jax.train.updates.modality import own_modules


@dataclasses.dataclass(frozen=True)
class OGMGE:
    """Slows the encoders of modalities that are ahead; they are named as their groups are."""

    alpha: float = 0.5  # how much; 0.1 to 0.8 are published
    noise: float = 1.0  # deviations of a leaf's gradient that are added to it; 0: OGM without GE
    at: At = "update"

    def __post_init__(self):
        if self.alpha < 0 or self.noise < 0:
            raise ValueError(f"alpha={self.alpha} and noise={self.noise} must be >= 0")

    def init(self, names: tuple[str, ...]) -> dict[str, Any]:
        """It remembers nothing."""
        return {}

    def __call__(self, facts: Facts, state: dict[str, Any]) -> tuple[GroupWeights, dict[str, Any]]:
        """One factor for each encoder, whatever group a gradient comes from."""
        modules = own_modules(facts, type(self).__name__)
        missing = [name for name in modules if name not in facts.scores]
        if missing or len(modules) < 2:
            raise ValueError(
                f"gradients=OGMGE needs two groups or more with a head of classes each, which say "
                f"{PROBABILITY!r}: {', '.join(missing or modules)}"
            )
        factors = slowed(jnp.stack([facts.scores[name] for name in modules]), self.alpha)
        ones = jnp.ones(len(facts.names))
        weights, shown = facts.everywhere(ones), {}
        for factor, name in zip(factors, modules, strict=True):
            weights[name], shown[f"gradients/{name}/factor"] = factor * ones, factor
        noise = dict.fromkeys(modules, jnp.float32(self.noise)) if self.noise else {}
        return GroupWeights(weights, noise, shown), state


def slowed(scores: Float[Array, " U"], alpha: float) -> Float[Array, " U"]:
    """The factor of each modality, from its score and the mean of the others'."""
    others = (jnp.sum(scores) - scores) / (len(scores) - 1)
    ratio = scores / jnp.maximum(others, 1e-12)
    return jnp.where(ratio > 1, 1.0 - jnp.tanh(alpha * ratio), 1.0)
