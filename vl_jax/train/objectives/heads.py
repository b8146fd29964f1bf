"""Heads: the losses of some heads of a joint model, each over the rows that have its label."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl_jax.batch import Batch, Given, hint_of
from vl_jax.train.objectives.objective import Sums, apply, beside


@dataclasses.dataclass(frozen=True)
class Heads:
    """The weighted sum of the losses of heads whose rows do not act on one another.

    The model needs ``predictions`` by head in its output, and ``head(name)`` in its config (see ``joint``).
    """

    heads: tuple[str, ...] = ("label",)
    loss_weights: tuple[float, ...] = ()  # one a head; empty: all alike
    modalities: tuple[str, ...] = ()  # one a head: the group of its gradient; empty: a group a head

    def __post_init__(self):
        if not self.heads or (self.loss_weights and len(self.loss_weights) != len(self.heads)):
            raise ValueError(
                f"heads={self.heads}, loss_weights={self.loss_weights}: expected one weight a head"
            )
        if self.modalities and len(self.modalities) != len(self.heads):
            raise ValueError(f"heads={self.heads}, modalities={self.modalities}: expected one a head")

    @property
    def couples_rows(self) -> bool:
        """Rows do not act on one another."""
        return False

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of every head's loss."""
        weights = self.loss_weights or (1.0,) * len(self.heads)
        return {_loss(head): weight for head, weight in zip(self.heads, weights, strict=True)}

    @property
    def groups(self) -> Mapping[str, str]:
        """The group of every head's loss, see ``updates.groups``."""
        groups = self.modalities or self.heads
        return {_loss(head): group for head, group in zip(self.heads, groups, strict=True)}

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        """The rows that have each head's label; at least 1, so that a batch without any adds nothing.

        Raises:
          ValueError: rows have no label of a head, so the model does not have the head.
        """
        unknown = next((head for head in self.heads if head not in batch.labels), None)
        if unknown is not None:
            known = ", ".join(batch.labels) or "none"
            raise ValueError(f"objective.heads={self.heads}: no head {unknown!r}; the model has: {known}")
        return {
            head: jnp.maximum(jnp.sum(batch.labels[head].present), 1).astype(jnp.float32)
            for head in self.heads
        }

    def __call__(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array] | None
    ) -> Sums:
        """The sums of every head, and the auxiliary losses of sparse layers."""
        hints = self._hints(batch, model, rngs)
        batch = dataclasses.replace(batch, media={**batch.media, **hints})
        output, collections = apply(params, state, batch, model=model, rngs=rngs)
        losses, metrics = {}, {}
        for name in self.heads:
            head = model.config.head(name)  # pyright: ignore[reportAttributeAccessIssue]
            if not hasattr(head, "sums"):
                kind = type(head).__name__
                raise ValueError(f"head {name!r}: {kind} has no loss of its own; another objective trains it")
            losses[_loss(name)], found = head.sums(output.predictions[name], batch.labels[name])
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
        auxiliary, stats, gates = beside(output)
        return Sums(losses, metrics, auxiliary, stats, collections, gates)

    def _hints(self, batch: Batch, model: nn.Module, rngs: dict[str, jax.Array] | None) -> dict[str, Given]:
        """What heads are told beside their streams: those that say a label piece by piece, the label."""
        del rngs
        hints = {}
        for name in self.heads:
            head: Any = model.config.head(name)  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(head, "led"):
                label = batch.labels[name]
                hints[hint_of(name)] = Given(head.led(label), label.present)
        return hints


def _loss(head: str) -> str:
    return f"{head}/loss"
