"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values are projections of one normalised latent c of rank R; position enters through a small rotary
part, of which the key is shared by all heads:

    query  = x W_q                                    -> per head [nope | rope]
    c, k_r = norm(x W_kva[:R]), rotate(x W_kva[R:])
    k, v   = c W_kvb                                  -> per head [nope | value]
    score  = (q_nope . k_nope + q_rope . k_r) / sqrt(nope + rope)

Training expands keys and values. Decoding *absorbs* W_kvb into query and output, so that the cache holds the
latent alone; both forms give the same numbers.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.nn import attention, rope
from vl_jax.nn.layers import Linear, RMSNorm, as_used, fan_in, join_heads, named, split_heads
from vl_jax.nn.masks import PackedMask
from vl_jax.nn.rope import RopeConfig

# The inner norms of DeepSeek-V2 keep this value whatever the epsilon of the outer norms.
INNER_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Defaults are DeepSeek-VL2 (base)."""

    num_heads: int = 32
    q_lora_rank: int | None = None  # None: queries are projected in one step
    kv_lora_rank: int = 512
    qk_nope_dim: int = 128
    qk_rope_dim: int = 64
    v_head_dim: int = 128
    rope: RopeConfig = RopeConfig(pairs="adjacent")
    use_bias: bool = False  # of the projections down to the ranks, and of the output

    def __post_init__(self):
        if self.qk_rope_dim % 2:
            raise ValueError(f"qk_rope_dim={self.qk_rope_dim} must be even")

    @property
    def scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return (self.qk_nope_dim + self.qk_rope_dim) ** -0.5 * self.rope.softmax_scale

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """What a cache keeps of one token: the normalised latent and the rotated shared key."""
        return ((self.kv_lora_rank,), (self.qk_rope_dim,))


def expand(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B T R"],
    key_rope: Float[Array, "B T P"],
    kv_up: Float[Array, "N HV R"],
) -> tuple[Float[Array, "B T N HP"], Float[Array, "B T N HP"], Float[Array, "B T N V"]]:
    """Query, key and value of every head, written out: the training form."""
    heads, nope = q_nope.shape[2:]
    # Two products: the weights are cut, not the activations, whose gradients would have to be padded again.
    up = jnp.moveaxis(kv_up, -1, 0)
    k_nope, value = split_heads(latent, up[..., :nope]), split_heads(latent, up[..., nope:])
    shared = jnp.broadcast_to(key_rope[:, :, None], (*key_rope.shape[:2], heads, key_rope.shape[-1]))
    query = jnp.concatenate([q_nope, q_rope], axis=-1)
    return query, jnp.concatenate([k_nope, shared], axis=-1), value


def absorbed_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B T R"],
    key_rope: Float[Array, "B T P"],
    kv_up: Float[Array, "N HV R"],
    cached: tuple[Float[Array, "B S R"], Float[Array, "B S P"]],
    *,
    mask: Bool[Array, "B T ST"],
    scale: float,
) -> Float[Array, "B T N V"]:
    """The decoding form: attends over the latents themselves, of a cache's S slots and of T new tokens."""
    nope = q_nope.shape[-1]
    q_latent = jnp.einsum("BTNH,NHR->BTNR", q_nope, kv_up[:, :nope])

    def products(latent: jax.Array, key_rope: jax.Array) -> jax.Array:
        content = jnp.einsum("BTNR,BSR->BNTS", q_latent, latent, preferred_element_type=jnp.float32)
        return content + jnp.einsum("BTNP,BSP->BNTS", q_rope, key_rope, preferred_element_type=jnp.float32)

    scores = jnp.concatenate([products(*cached), products(latent, key_rope)], axis=-1)
    weights = attention.masked_softmax(scores * scale, mask[:, None]).astype(latent.dtype)
    before, now = jnp.split(weights, [cached[0].shape[1]], axis=-1)
    # [B N T R], and no einsum, which would transpose the cache.
    mixed = jnp.matmul(before, cached[0][:, None]) + jnp.matmul(now, latent[:, None])
    return jnp.einsum("BNTR,NVR->BTNV", mixed, kv_up[:, nope:])


class MLA(nn.Module):
    """Latent attention, over the tokens and, if there are any before them, those of a cache."""

    config: MLAConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T ST"] | PackedMask,
        cached: tuple[Float[Array, "B S R"], Float[Array, "B S P"]] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T R"], Float[Array, "B T P"]]]:
        c = self.config
        angle = rope.angles(positions, dim=c.qk_rope_dim, config=c.rope)
        q_nope, q_rope = self._query(x, angle)
        down = Linear(c.kv_lora_rank + c.qk_rope_dim, ("embed", None), use_bias=c.use_bias, name="kv_down")(x)
        latent = RMSNorm(INNER_EPSILON, name="kv_norm")(down[..., : c.kv_lora_rank])
        key_rope = rope.rotate(down[..., None, c.kv_lora_rank :], angle, c.rope)[:, :, 0]
        # Heads first and the rank last: absorbed, it is multiplied from both sides as it lies in memory.
        init = named(fan_in(in_axis=2), "heads", None, "embed", inputs=(2,))
        kv_up = self.param("kv_up", init, (c.num_heads, c.qk_nope_dim + c.v_head_dim, c.kv_lora_rank))
        kv_up = as_used(kv_up, x.dtype, "heads", None, "embed", rows=x.shape[0])
        if cached is None:
            query, key, value = expand(q_nope, q_rope, latent, key_rope, kv_up)
            if self.is_mutable_collection("intermediates"):
                weights = attention.attention_weights(query, key, mask=mask, scale=c.scale)
                self.sow("intermediates", "weights", weights)
                self.sow("intermediates", "key_value", split_heads(latent, jnp.moveaxis(kv_up, -1, 0)))
            mixed = attention.attend(query, key, value, mask=mask, scale=c.scale, causal=True)
        else:
            options = {"mask": mask, "scale": c.scale}
            mixed = absorbed_attention(q_nope, q_rope, latent, key_rope, kv_up, cached, **options)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        output = self.param("output", init, (c.num_heads, c.v_head_dim, x.shape[-1]))
        y = join_heads(mixed, as_used(output, x.dtype, "heads", None, "embed", rows=x.shape[0]))
        if c.use_bias:
            bias = self.param("output_bias", named(nn.initializers.zeros, None), (x.shape[-1],))
            y = y + bias.astype(x.dtype)
        return y, (latent, key_rope)

    def _query(self, x: jax.Array, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The content part of every head's query, and its rotated part."""
        c, source = self.config, x
        if c.q_lora_rank is not None:
            source = Linear(c.q_lora_rank, ("embed", None), use_bias=c.use_bias, name="query_down")(x)
            source = RMSNorm(INNER_EPSILON, name="query_norm")(source)
        shape = (source.shape[-1], c.num_heads, c.qk_nope_dim + c.qk_rope_dim)
        kernel = self.param("query", named(fan_in(), "embed", "heads", None, inputs=(0,)), shape)
        query = split_heads(source, as_used(kernel, x.dtype, "embed", "heads", None, rows=x.shape[0]))
        self.sow("intermediates", "projected_query", query)
        return query[..., : c.qk_nope_dim], rope.rotate(query[..., c.qk_nope_dim :], angle, c.rope)
