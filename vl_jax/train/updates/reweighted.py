"""Plain re-weighting: a fixed weight for each group. At the gradient this is a weight of its losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from vl_jax.train.updates.fusing import At, Facts, GroupWeights


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """Fixed weights of groups; 1 where none is given."""

    weights: tuple[tuple[str, float], ...] = ()  # by the name of the group
    at: At = "update"

    def init(self, names: tuple[str, ...]) -> dict[str, Any]:
        """It remembers nothing.

        Raises:
          ValueError: there is no such group.
        """
        unknown = [name for name, _ in self.weights if name not in names]
        if unknown:
            raise ValueError(f"gradients.weights: {unknown[0]!r} is no group; there are: {', '.join(names)}")
        return {}

    def __call__(self, facts: Facts, state: dict[str, Any]) -> tuple[GroupWeights, dict[str, Any]]:
        """The same weights in every module and at every step."""
        given = dict(self.weights)
        weights = jnp.asarray([given.get(name, 1.0) for name in facts.names], jnp.float32)
        return GroupWeights(facts.everywhere(weights)), state
