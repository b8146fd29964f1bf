"""The cross-modal gate: between decoder layers, text tokens attend to vision tokens through a learned gate.

    x + tanh(opening[head]) * sigmoid(norm(x) @ selector)[token, head] * cross_attention(norm(x), vision)

``opening`` starts at zero, so at step 0 the model equals its text model exactly (Flamingo, arXiv 2204.14198);
``selector`` lets every token decide how much it looks.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.nn import attention
from vl_jax.nn.layers import RMSNorm, fan_in, named


@dataclasses.dataclass(frozen=True)
class CrossModalGateConfig:
    """Cross-attention heads of the gate."""

    num_heads: int = 8
    head_dim: int = 64

    def __post_init__(self):
        if self.num_heads < 1 or self.head_dim < 1:
            raise ValueError(f"num_heads={self.num_heads}, head_dim={self.head_dim}: must be >= 1")


def gated_cross_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    opening: Float[Array, " N"],
    choice: Float[Array, "B T N"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Attention to vision tokens, scaled by ``tanh(opening)`` per head and ``sigmoid(choice)`` per token."""
    seen = attention.attend(query, key, value, mask=mask, scale=query.shape[-1] ** -0.5)
    gate = jnp.tanh(opening) * jax.nn.sigmoid(choice.astype(jnp.float32))
    return seen * gate[..., None].astype(seen.dtype)


class CrossModalGate(nn.Module):
    """What flows from vision tokens into text tokens; returns the residual to add."""

    config: CrossModalGateConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], vision: Float[Array, "B S D"], mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B T D"]:
        c, width = self.config, x.shape[-1]
        normed, seen = RMSNorm(name="norm")(x), RMSNorm(name="norm_vision")(vision)

        def project(name: str, source: jax.Array) -> jax.Array:
            init = named(fan_in(), "embed", "heads", None, inputs=(0,))
            kernel = self.param(name, init, (width, c.num_heads, c.head_dim))
            return jnp.einsum("BSD,DNH->BSNH", source, kernel.astype(source.dtype))

        query, key, value = project("query", normed), project("key", seen), project("value", seen)
        opening = self.param("opening", named(nn.initializers.zeros, None), (c.num_heads,))
        selector = self.param("selector", named(fan_in(), "embed", None, decay=True), (width, c.num_heads))
        mixed = gated_cross_attention(
            query, key, value, opening=opening, choice=normed @ selector.astype(x.dtype), mask=mask
        )
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        out = self.param("output", init, (c.num_heads, c.head_dim, width))
        return jnp.einsum("BTNH,NHD->BTD", mixed, out.astype(x.dtype))
