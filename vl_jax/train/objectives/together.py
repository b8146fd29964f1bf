"""Several objectives on one batch, each with a weight and logged by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl_jax.batch import Batch
from vl_jax.schema import Open
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.objectives.denoising import Denoising
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.objectives.hierarchical import Hierarchical
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.objectives.objective import Objective, Sums

NEEDS = ("couples_rows", "weights", "total", "__call__")  # what a class of an objective must have


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the objectives."""

    name: str  # goes before the names of its losses and metrics: "captions/loss"
    objective: Annotated[
        NextToken | Heads | Denoising | ContrastivePairs | Hierarchical | Objective, Open("objective", NEEDS)
    ] = NextToken()
    weight: float = 1.0  # how much it counts

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} of objective {self.name!r} must be > 0")


@dataclasses.dataclass(frozen=True)
class Together:
    """The weighted sum of several objectives, each computed on the whole batch and divided by its own total.

    Each part runs the model once. What routing reports is added up over the parts.
    """

    parts: tuple[Part, ...] = (Part("text"),)

    def __post_init__(self):
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"parts are named {names}: there must be at least one, with different names")

    @property
    def couples_rows(self) -> bool:
        """Whether rows act on one another in any part."""
        return any(part.objective.couples_rows for part in self.parts)

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of every loss of every part."""
        return {
            f"{part.name}/{name}": part.weight * weight
            for part in self.parts
            for name, weight in part.objective.weights.items()
        }

    @property
    def groups(self) -> Mapping[str, str]:
        """The group of every loss: the part, or where a part has several groups, that of the loss in it."""
        found = {}
        for part in self.parts:
            told = getattr(part.objective, "groups", {})
            several = len(set(told.values())) > 1
            for name in part.objective.weights:
                found[f"{part.name}/{name}"] = told[name] if several else part.name
        return found

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        """The totals of all parts."""
        return {
            f"{part.name}/{name}": value
            for part in self.parts
            for name, value in part.objective.total(batch).items()
        }

    def __call__(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array] | None
    ) -> Sums:
        """The sums of all parts; what one part changes in the collections the next one finds changed."""
        losses, metrics, stats, gates, auxiliary = {}, {}, {}, {}, 0.0
        collections: dict[str, Any] = {}
        for part in self.parts:
            found = part.objective(params, state, batch, model=model, rngs=rngs)
            losses |= {f"{part.name}/{name}": value for name, value in found.losses.items()}
            metrics |= {f"{part.name}/{name}": value for name, value in found.metrics.items()}
            auxiliary = auxiliary + part.weight * found.auxiliary
            for stack, counted in found.stats.items():
                stats[stack] = jax.tree.map(jnp.add, stats[stack], counted) if stack in stats else counted
            if found.gates:
                gates = jax.tree.map(jnp.add, gates, found.gates) if gates else found.gates
            collections = collections | found.collections
            state = dataclasses.replace(state, collections=state.collections | collections)
        return Sums(losses, metrics, auxiliary, stats, collections, gates)


AnyObjective = Annotated[
    NextToken | Heads | Denoising | ContrastivePairs | Hierarchical | Together | Objective,
    Open("objective", NEEDS),
]
