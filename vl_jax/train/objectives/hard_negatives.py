"""Contrastive losses whose negatives count by how hard they are.

    negative j of a row counts   K exp(h z_j) / sum_k exp(h z_k)   times     K negatives, h their hardness

The weights of a row are 1 on average. With h = 0 all are 1, and the loss is the plain one; the larger h, the
more the negatives count that a row takes for its own (Robinson et al. 2021, arXiv 2010.04592, section 3; for
pictures and texts Radenovic et al. 2023, arXiv 2301.02280, "HN-NCE"). The weights follow from the logits, and
the gradient goes through them. Positives are neither weighted nor counted.

Sums of exponentials are kept relative to the highest negative logit, or positive one, that a row has met.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vl_jax.train.objectives.pair_forms import Met


def check(hardness: float) -> None:
    """Raises ValueError: it is negative."""
    if not hardness >= 0:
        raise ValueError(f"hardness={hardness}: must be >= 0")


def _shrink(factor: float, seen: Met, after: Met) -> jax.Array:
    """What sums of ``exp(factor * logit)`` over negatives are multiplied by when a harder one was met."""
    return jnp.exp(factor * (seen.best_negative - after.best_negative))


def _kept(seen: Met, z: jax.Array, negative: jax.Array, factor: float) -> jax.Array:
    """``exp(factor * logit)`` of negatives relative to the hardest, 0 of all else."""
    return jnp.where(negative, jnp.exp(factor * (z - seen.best_negative[:, None])), 0.0)


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)


@dataclasses.dataclass(frozen=True)
class HardSoftmax:
    """CLIP's loss: a row's own exponentials, and those of its negatives times their weights."""

    hardness: float
    # The number of negatives; exp(z) of positives; exp((1 + h) z) and exp(h z) of negatives.
    names: tuple[str, ...] = ("negatives", "own", "hard", "weights")

    def __post_init__(self):
        check(self.hardness)

    def sums(
        self, seen: Met, after: Met, z: jax.Array, valid: jax.Array, positive: jax.Array
    ) -> dict[str, jax.Array]:
        negative, before, h = valid & ~positive, seen.sums, self.hardness
        own = jnp.where(positive, jnp.exp(z - after.best_positive[:, None]), 0.0)
        shrunk = before["own"] * jnp.exp(seen.best_positive - after.best_positive)
        found = {"negatives": before["negatives"] + jnp.sum(negative, axis=1, dtype=jnp.float32)}
        found["own"] = shrunk + jnp.sum(own, axis=1)
        for name, factor in (("hard", 1 + h), ("weights", h)):
            new = jnp.sum(_kept(after, z, negative, factor), axis=1)
            found[name] = before[name] * _shrink(factor, seen, after) + new
        return found

    def _logarithms(self, seen: Met) -> tuple[jax.Array, jax.Array]:
        """Logarithms of the positives' sum, and of that of the negatives with their weights."""
        of = seen.sums
        own = seen.best_positive + jnp.log(_or_one(of["own"]))
        others = jnp.log(_or_one(of["negatives"])) + seen.best_negative
        others += jnp.log(_or_one(of["hard"])) - jnp.log(_or_one(of["weights"]))
        return own, jnp.where(of["negatives"] > 0, others, -jnp.inf)

    def loss(self, images: Met, texts: Met) -> jax.Array:
        return (self._of(images) + self._of(texts)) / 2

    def _of(self, seen: Met) -> jax.Array:
        asked = seen.positives > 0
        mean = seen.positive_logits / jnp.where(asked, seen.positives, 1.0)
        return jnp.sum(jnp.where(asked, jnp.logaddexp(*self._logarithms(seen)) - mean, 0.0))

    def slope(
        self, z: jax.Array, valid: jax.Array, positive: jax.Array, images: Met, texts: Met
    ) -> jax.Array:
        by_image = self._slope(z, valid, positive, images)
        return (by_image + self._slope(z.T, valid.T, positive.T, texts).T) / 2

    def _slope(self, z: jax.Array, valid: jax.Array, positive: jax.Array, seen: Met) -> jax.Array:
        asked, of, h = seen.positives > 0, seen.sums, self.hardness
        own, others = self._logarithms(seen)
        share, rest = jax.nn.sigmoid(own - others), jax.nn.sigmoid(others - own)  # of their sum
        mine = jnp.exp(z - seen.best_positive[:, None]) * (share / _or_one(of["own"]))[:, None]
        mine -= 1.0 / jnp.where(asked, seen.positives, 1.0)[:, None]
        negative = valid & ~positive
        hard = _kept(seen, z, negative, 1 + h) / _or_one(of["hard"])[:, None]
        weights = _kept(seen, z, negative, h) / _or_one(of["weights"])[:, None]
        theirs = rest[:, None] * ((1 + h) * hard - h * weights)
        return jnp.where(asked[:, None], jnp.where(positive, mine, theirs), 0.0)


@dataclasses.dataclass(frozen=True)
class HardSigmoid:
    """SigLIP's loss: every no counts by its weight, half by those of its image and half by its text's."""

    hardness: float
    # The number of negatives; losses of positives; exp(h z) of negatives times their loss, and alone.
    names: tuple[str, ...] = ("negatives", "own", "hard", "weights")

    def __post_init__(self):
        check(self.hardness)

    def sums(
        self, seen: Met, after: Met, z: jax.Array, valid: jax.Array, positive: jax.Array
    ) -> dict[str, jax.Array]:
        negative, before = valid & ~positive, seen.sums
        weights, shrink = _kept(after, z, negative, self.hardness), _shrink(self.hardness, seen, after)
        own = jnp.sum(jnp.where(positive, jax.nn.softplus(-z), 0.0), axis=1)
        hard = jnp.sum(weights * jax.nn.softplus(jnp.where(negative, z, 0.0)), axis=1)
        return {
            "negatives": before["negatives"] + jnp.sum(negative, axis=1, dtype=jnp.float32),
            "own": before["own"] + own,
            "hard": before["hard"] * shrink + hard,
            "weights": before["weights"] * shrink + jnp.sum(weights, axis=1),
        }

    def loss(self, images: Met, texts: Met) -> jax.Array:
        return (self._of(images) + self._of(texts)) / 2

    def _of(self, seen: Met) -> jax.Array:
        return jnp.sum(seen.sums["own"] + seen.sums["negatives"] * self._mean(seen))

    def _mean(self, seen: Met) -> jax.Array:
        """The weighted mean loss of a row's negatives."""
        return seen.sums["hard"] / _or_one(seen.sums["weights"])

    def slope(
        self, z: jax.Array, valid: jax.Array, positive: jax.Array, images: Met, texts: Met
    ) -> jax.Array:
        by_image = self._slope(z, valid, positive, images)
        return (by_image + self._slope(z.T, valid.T, positive.T, texts).T) / 2

    def _slope(self, z: jax.Array, valid: jax.Array, positive: jax.Array, seen: Met) -> jax.Array:
        weights = _kept(seen, z, valid & ~positive, self.hardness)
        weights *= (seen.sums["negatives"] / _or_one(seen.sums["weights"]))[:, None]
        above = jax.nn.softplus(z) - self._mean(seen)[:, None]
        others = weights * (jax.nn.sigmoid(z) + self.hardness * above)
        return jnp.where(positive, -jax.nn.sigmoid(-z), others)
