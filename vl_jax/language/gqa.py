"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): N query heads share K key heads.

    query = rotate(norm(x W_q + b_q))  [N H]
    key   = rotate(norm(x W_k + b_k))  [K H]
    value = x W_v + b_v                [K H]

With K = N it is plain multi-head attention. Norms, biases, clipping and sinks are choices of the config.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.nn import attention, rope
from vl_jax.nn.layers import RMSNorm, as_used, fan_in, join_heads, named, split_heads
from vl_jax.nn.masks import PackedMask
from vl_jax.nn.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Defaults are Llama's."""

    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False  # RMS norm over all heads of query and key together (OLMoE)
    norm_epsilon: float = 1e-5  # of that norm
    clip: float | None = None  # query, key and value are clamped to +- this
    sinks: bool = False  # a learned logit per head to attend to nothing (GPT-OSS)

    def __post_init__(self):
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """What a cache keeps of one token: key and value."""
        return ((self.num_kv_heads, self.head_dim),) * 2


class GQA(nn.Module):
    """Attention with its projections, over the tokens and, if there are any before them, those of a cache."""

    config: GQAConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T ST"] | PackedMask,
        cached: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        c = self.config
        query = self._clip(self._normed(self._project(x, "query", c.num_heads), "query_norm"))
        key = self._clip(self._normed(self._project(x, "key", c.num_kv_heads), "key_norm"))
        value = self._clip(self._project(x, "value", c.num_kv_heads))
        angle = rope.angles(positions, dim=c.head_dim, config=c.rope)
        query, key = rope.rotate(query, angle, c.rope), rope.rotate(key, angle, c.rope)
        sinks = None
        if c.sinks:
            sinks = self.param("sinks", named(nn.initializers.zeros, "heads"), (c.num_heads,))
        scale = c.head_dim**-0.5 * c.rope.softmax_scale
        options = {"mask": mask, "scale": scale, "sinks": sinks}
        if cached is None:
            if self.is_mutable_collection("intermediates"):
                self.sow("intermediates", "weights", attention.attention_weights(query, key, **options))
            mixed = attention.attend(query, key, value, **options, causal=True)
        else:
            mixed = attention.attend_cached(query, key, value, cached, **options)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        output = self.param("output", init, (c.num_heads, c.head_dim, x.shape[-1]))
        y = join_heads(mixed, as_used(output, x.dtype, "heads", None, "embed", rows=x.shape[0]))
        if c.output_bias:
            bias = self.param("output_bias", named(nn.initializers.zeros, None), (x.shape[-1],))
            y = y + bias.astype(x.dtype)
        return y, (key, value)

    def _project(self, x: jax.Array, name: str, heads: int) -> jax.Array:
        c = self.config
        init = named(fan_in(), "embed", "heads", None, inputs=(0,))
        kernel = self.param(name, init, (x.shape[-1], heads, c.head_dim))
        y = split_heads(x, as_used(kernel, x.dtype, "embed", "heads", None, rows=x.shape[0]))
        if c.qkv_bias:
            init = named(nn.initializers.zeros, "heads", None)
            y = y + self.param(f"{name}_bias", init, (heads, c.head_dim)).astype(x.dtype)
        return y

    def _clip(self, x: jax.Array) -> jax.Array:
        limit = self.config.clip
        return x if limit is None else jnp.clip(x, -limit, limit)

    def _normed(self, x: jax.Array, name: str) -> jax.Array:
        c = self.config
        if not c.qk_norm:
            return x
        flat = RMSNorm(c.norm_epsilon, name=name)(x.reshape(*x.shape[:2], -1))
        return flat.reshape(x.shape)
