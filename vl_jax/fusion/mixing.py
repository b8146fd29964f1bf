"""Softmax weights of modalities: a row decides how much each of its modalities counts.

    stream --pool--> norm --> vector [B D] --.
                         `--> score  [B] ----+-- softmax over the modalities that are there --> weighted sum

A score has a hidden layer, since how noisy a vector is cannot be read off it by a sum. Without dropout of
whole modalities the weights go to whichever is easiest to learn from. So training may hide some of a row's
modalities at random; one is always left.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from vl_jax.fusion.streams import Streams, add_vector, filled, here, pool
from vl_jax.fusion.weights import ModalityWeights
from vl_jax.nn.layers import LayerNorm, Linear

DROPOUT = "modalities"  # the random stream that training gives, and inference does not


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The weighted sum of the towers' vectors."""

    dim: int = 256  # width of the sum
    dropout: float = 0.0  # how likely a modality of a row is hidden in training
    name: str = "fused"  # of the stream that comes of it

    reads_empty: ClassVar[bool] = True
    weighs: ClassVar[bool] = True  # its streams say how much each modality counts

    def __post_init__(self):
        if self.dim < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"dim={self.dim}, dropout={self.dropout} of Mixing: must be >= 1, in [0, 1)")

    @property
    def draws(self) -> tuple[str, ...]:
        """The random streams that training has to give."""
        return (DROPOUT,) if self.dropout else ()

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, and the fused stream."""
        return *towers, self.name

    def build(self) -> nn.Module:
        """The module."""
        return WeightedSum(self)


def mixing_weights(scores: Float[Array, "B N"], present: Bool[Array, "B N"]) -> Float[Array, "B N"]:
    """Softmax over the modalities that are there, in float32; all 0 where none is."""
    scores = jnp.where(present, scores.astype(jnp.float32), -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0.0))
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def hide(
    key: jax.Array,
    present: Bool[Array, "B N"],
    content: UInt32[Array, " B"],
    numbers: UInt32[Array, " N"],
    rate: float,
) -> Bool[Array, "B N"]:
    """What is left of the modalities that are there after each is hidden at a rate; one at least, if any was.

    Args:
      content: a number of each row, and ``numbers`` of each modality, that the draw follows: it is the same
        wherever the row and the modality stand.
    """

    def draw(row: jax.Array, modality: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), modality))

    drawn = jax.vmap(lambda row: jax.vmap(lambda modality: draw(row, modality))(numbers))(content)
    drawn = jnp.where(present, drawn, -1.0)
    kept = drawn >= jnp.minimum(rate, jnp.max(drawn, axis=1, keepdims=True))
    return present & kept


class WeightedSum(nn.Module):
    """Adds the fused stream: one token a row, which is its vector too."""

    config: Mixing

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c, seen = self.config, filled(streams)
        if not seen:
            nothing = next(iter(streams.values())).tokens
            return add_vector(streams, c.name, jnp.zeros((nothing.shape[0], c.dim), nothing.dtype))
        vectors, scores = [], []
        for name, stream in seen.items():
            x = LayerNorm(name=f"{name}_norm")(pool(stream))
            vectors.append(Linear(c.dim, ("embed", None), True, name=f"{name}_vector")(x))
            hidden = nn.silu(Linear(c.dim, ("embed", None), True, name=f"{name}_hidden")(x))
            scores.append(Linear(1, ("embed", None), True, hidden=False, name=f"{name}_score")(hidden))
        present = jnp.stack([here(stream) for stream in seen.values()], axis=1)
        if c.dropout and self.has_rng(DROPOUT):
            content = next(iter(seen.values())).content
            assert content is not None
            present = hide(self.make_rng(DROPOUT), present, content, _numbers(tuple(seen)), rate=c.dropout)
        weights = mixing_weights(jnp.concatenate(scores, axis=1), present)
        fused = jnp.einsum("BN,BND->BD", weights.astype(vectors[0].dtype), jnp.stack(vectors, axis=1))
        said = ModalityWeights(weights, present, tuple(seen))
        return add_vector(streams, c.name, fused, weights=said)


def _numbers(names: tuple[str, ...]) -> UInt32[Array, " N"]:
    """A number of every name."""
    return jnp.asarray([zlib.crc32(name.encode()) for name in names], jnp.uint32)
