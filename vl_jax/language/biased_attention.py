"""T5's attention: unscaled scores, and a number per head and bucket of distances that is added to them.

    query . key + bias[bucket of (key's index - query's index)] -> softmax -> mixture of values

Initialisation makes up for the scale that scores lack. All layers of a stack share the biases.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vl_jax.nn import attention
from vl_jax.nn.layers import fan_in, named

KeysAndValues = tuple[jax.Array, jax.Array]


def distance_buckets(
    offsets: np.ndarray, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
    """The bucket of each offset of a key from its query (T5, section 2.1).

    Half of the buckets hold one distance each; the others grow with the logarithm up to ``max_distance``.
    Looking both ways, keys before and after the query have half of all buckets each; looking back only, all
    later keys are at distance 0.
    """
    first = np.zeros_like(offsets)
    distances = np.maximum(-offsets, 0)
    if bidirectional:
        num_buckets //= 2
        first, distances = np.where(offsets > 0, num_buckets, 0), np.abs(offsets)
    exact = num_buckets // 2
    # Published models round every step to float32, and at the border of two buckets that decides.
    ratio = np.maximum(distances, exact).astype(np.float32) / np.float32(exact)
    log_ratio = np.log(ratio.astype(np.float64)).astype(np.float32)
    wide = log_ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    buckets = np.minimum(exact + wide.astype(offsets.dtype), num_buckets - 1)
    return first + np.where(distances < exact, distances, buckets)


def position_bias(
    table: Float[Array, "buckets N"], length: int, *, max_distance: int, bidirectional: bool
) -> Float[Array, "1 N T T"]:
    """What positions add to the scores of self-attention over ``length`` tokens, from a row per bucket."""
    order = jnp.arange(length)
    return offset_bias(
        table,
        order - order[:, None],
        farthest=length - 1,
        max_distance=max_distance,
        bidirectional=bidirectional,
    )


def offset_bias(
    table: Float[Array, "buckets N"],
    offsets: Int[Array, "T S"],
    *,
    farthest: int,
    max_distance: int,
    bidirectional: bool,
) -> Float[Array, "1 N T S"]:
    """What is added to the score of a query and a key that stands ``offsets`` behind it.

    Args:
      farthest: no offset is larger, forwards or backwards: so many are put in buckets once, on the host.
    """
    buckets = distance_buckets(
        np.arange(-farthest, farthest + 1),
        num_buckets=table.shape[0],
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    by_offset = table.astype(jnp.float32)[buckets]
    return jnp.moveaxis(by_offset[offsets + farthest], -1, 0)[None]


class BiasedAttention(nn.Module):
    """Attention from ``x`` to ``source``, to ``x`` itself, or to what was projected before."""

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"] | None = None,
        *,
        mask: Bool[Array, "B #T S"],
        bias: Float[Array, "1 N T S"] | None = None,
        cached: KeysAndValues | None = None,
        projected: KeysAndValues | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysAndValues]:
        """The mixture, and keys and values of the source.

        Args:
          source: what is attended to; None: ``x``.
          cached: keys and values [B S N H] of tokens before those of the source; mask and bias begin with
            them.
          projected: keys and values in place of those that the source would have.
        """
        width, heads, dim = x.shape[-1], self.num_heads, self.head_dim

        def project(name: str, tokens: jax.Array, scale: float = 1.0) -> jax.Array:
            init = named(fan_in(scale=scale), "embed", "heads", None, inputs=(0,))
            kernel = self.param(name, init, (width, heads, dim))
            return jnp.einsum("BTD,DNH->BTNH", tokens, kernel.astype(x.dtype))

        # The initial queries have the factor 1/sqrt(H) that scores lack.
        query = project("query", x, scale=1 / dim)
        if projected is None:
            source = x if source is None else source
            projected = project("key", source), project("value", source)
        parts = [projected] if cached is None else [cached, projected]
        scores = jnp.concatenate([attention.dot_products(query, key) for key, _ in parts], axis=-1)
        weights = attention.masked_softmax(scores if bias is None else scores + bias, mask[:, None])
        self.sow("intermediates", "weights", weights)
        shares = jnp.split(weights, [parts[0][0].shape[1]], axis=-1)  # without a cache the second is empty
        mixed = sum(
            attention.weighted_sum(share, value)
            for share, (_, value) in zip(shares[: len(parts)], parts, strict=True)
        )
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        output = self.param("output", init, (heads, dim, width)).astype(x.dtype)
        return jnp.einsum("BTNH,NHD->BTD", mixed, output), projected
