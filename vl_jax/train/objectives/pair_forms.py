"""Forms of a contrastive loss: what a row remembers of the columns it met, its loss, and the loss's slope.

    see(seen, z)  ->  running sums of a row, any columns at a time  ->  loss  ->  slope by every logit

A row is an image among texts or a text among images. Nothing here knows of devices or chunks.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from vl_jax.params import Leaf

LOWEST = float(jnp.finfo(jnp.float32).min)


@struct.dataclass
class Met:
    """Running sums of rows over the columns they met, f32[R] each."""

    positives: Leaf  # their number
    positive_logits: Leaf  # their sum
    best_positive: Leaf  # the highest logit
    best_negative: Leaf
    sums: dict[str, Leaf]  # what the form needs besides, by name

    @property
    def highest(self) -> jax.Array:
        """The highest logit of all."""
        return jnp.maximum(self.best_positive, self.best_negative)


@runtime_checkable
class Form(Protocol):
    """A loss, by what rows have seen."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of ``Met.sums``."""
        ...

    def sums(
        self, seen: Met, after: Met, z: jax.Array, valid: jax.Array, positive: jax.Array
    ) -> dict[str, jax.Array]:
        """The form's own sums once some more columns were met; see ``see``."""
        ...

    def loss(self, images: Met, texts: Met) -> jax.Array:
        """Summed over rows."""
        ...

    def slope(
        self, z: jax.Array, valid: jax.Array, positive: jax.Array, images: Met, texts: Met
    ) -> jax.Array:
        """The gradient of the loss by the logits [R n]; whatever it likes where they are not valid."""
        ...


def nothing_seen(form: Form, rows: int) -> Met:
    """Rows before the first column."""
    zero, lowest = jnp.zeros(rows), jnp.full(rows, LOWEST)
    return Met(zero, zero, lowest, lowest, dict.fromkeys(form.names, zero))


def see(form: Form, seen: Met, z: jax.Array, valid: jax.Array, positive: jax.Array) -> Met:
    """Rows meet some more columns: ``z`` [R n], which of them count, and which are positives."""
    negative = valid & ~positive
    after = dataclasses.replace(
        seen,
        positives=seen.positives + jnp.sum(positive, axis=1, dtype=jnp.float32),
        positive_logits=seen.positive_logits + jnp.sum(jnp.where(positive, z, 0.0), axis=1),
        best_positive=jnp.maximum(seen.best_positive, jnp.max(jnp.where(positive, z, LOWEST), axis=1)),
        best_negative=jnp.maximum(seen.best_negative, jnp.max(jnp.where(negative, z, LOWEST), axis=1)),
    )
    return dataclasses.replace(after, sums=form.sums(seen, after, z, valid, positive))


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Every row that has a positive classifies the columns; ``total`` is of exp(logit - highest)."""

    names: tuple[str, ...] = ("total",)

    def sums(
        self, seen: Met, after: Met, z: jax.Array, valid: jax.Array, positive: jax.Array
    ) -> dict[str, jax.Array]:
        kept = seen.sums["total"] * jnp.exp(seen.highest - after.highest)
        # Chosen before the exponential, which is infinite in rows without any column, and so its gradient.
        terms = jnp.exp(jnp.where(valid, z - after.highest[:, None], LOWEST))
        return {"total": kept + jnp.sum(terms, axis=1)}

    def loss(self, images: Met, texts: Met) -> jax.Array:
        return (self._of(images) + self._of(texts)) / 2

    def _of(self, seen: Met) -> jax.Array:
        asked = seen.positives > 0
        mean = seen.positive_logits / jnp.where(asked, seen.positives, 1.0)
        loss = jnp.log(jnp.where(asked, seen.sums["total"], 1.0)) + (seen.highest - mean)
        return jnp.sum(jnp.where(asked, loss, 0.0))

    def slope(
        self, z: jax.Array, valid: jax.Array, positive: jax.Array, images: Met, texts: Met
    ) -> jax.Array:
        return (self._slope(z, positive, images) + self._slope(z.T, positive.T, texts).T) / 2

    def _slope(self, z: jax.Array, positive: jax.Array, seen: Met) -> jax.Array:
        """Softmax minus target, for rows that have one."""
        asked = seen.positives > 0
        # The logits before the logarithm: their difference is exact near the highest, where the softmax is
        # large.
        total = jnp.where(asked, seen.sums["total"], 1.0)
        softmax = jnp.exp(z - seen.highest[:, None]) / total[:, None]
        target = jnp.where(positive, 1.0 / jnp.where(asked, seen.positives, 1.0)[:, None], 0.0)
        return jnp.where(asked[:, None], softmax - target, 0.0)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """Every pair is a yes or no; ``total`` is of their losses, the same for images and for texts."""

    names: tuple[str, ...] = ("total",)

    def sums(
        self, seen: Met, after: Met, z: jax.Array, valid: jax.Array, positive: jax.Array
    ) -> dict[str, jax.Array]:
        terms = jax.nn.softplus(jnp.where(positive, -z, z))
        return {"total": seen.sums["total"] + jnp.sum(jnp.where(valid, terms, 0.0), axis=1)}

    def loss(self, images: Met, texts: Met) -> jax.Array:
        return jnp.sum(images.sums["total"])

    def slope(
        self, z: jax.Array, valid: jax.Array, positive: jax.Array, images: Met, texts: Met
    ) -> jax.Array:
        return jnp.where(positive, -jax.nn.sigmoid(-z), jax.nn.sigmoid(z))
