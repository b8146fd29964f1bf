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
from vl_jax.nn.layers import Linear, RMSNorm, fan_in, named

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
    rope_theta: float = 10_000.0

    def __post_init__(self):
        if self.qk_rope_dim % 2:
            raise ValueError(f"qk_rope_dim={self.qk_rope_dim} must be even")

    @property
    def scale(self) -> float:
        return (self.qk_nope_dim + self.qk_rope_dim) ** -0.5


def expanded_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B T R"],
    key_rope: Float[Array, "B T P"],
    kv_up: Float[Array, "R N HV"],
    *,
    mask: Bool[Array, "B T T"],
    scale: float,
) -> Float[Array, "B T N V"]:
    """The training form: keys and values of every head are written out."""
    heads, nope = q_nope.shape[2:]
    kv = jnp.einsum("BTR,RNX->BTNX", latent, kv_up)
    shared = jnp.broadcast_to(key_rope[:, :, None], (*key_rope.shape[:2], heads, key_rope.shape[-1]))
    query = jnp.concatenate([q_nope, q_rope], axis=-1)
    key = jnp.concatenate([kv[..., :nope], shared], axis=-1)
    return attention.attend(query, key, kv[..., nope:], mask=mask, scale=scale)


def absorbed_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S R"],
    key_rope: Float[Array, "B S P"],
    kv_up: Float[Array, "R N HV"],
    *,
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N V"]:
    """The decoding form: attends over the latents themselves, never expanding the cache."""
    nope = q_nope.shape[-1]
    q_latent = jnp.einsum("BTNH,RNH->BTNR", q_nope, kv_up[..., :nope])
    scores = jnp.einsum("BTNR,BSR->BNTS", q_latent, latent, preferred_element_type=jnp.float32)
    scores = scores + jnp.einsum("BTNP,BSP->BNTS", q_rope, key_rope, preferred_element_type=jnp.float32)
    weights = attention.masked_softmax(scores * scale, mask[:, None]).astype(latent.dtype)
    mixed = jnp.einsum("BNTS,BSR->BTNR", weights, latent)
    return jnp.einsum("BTNR,RNV->BTNV", mixed, kv_up[..., nope:])


class MLA(nn.Module):
    """Latent attention; with a cache it appends the new latents and attends over all of them."""

    config: MLAConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: tuple[Float[Array, "B S R"], Float[Array, "B S P"]] | None,
        length: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B S R"], Float[Array, "B S P"]] | None]:
        c, width = self.config, x.shape[-1]
        head_dim = c.qk_nope_dim + c.qk_rope_dim
        source, names = x, "embed"
        if c.q_lora_rank is not None:
            source = Linear(c.q_lora_rank, ("embed", None), name="query_down")(x)
            source, names = RMSNorm(INNER_EPSILON, name="query_norm")(source), None
        init = named(fan_in(), names, "heads", None)
        kernel = self.param("query", init, (source.shape[-1], c.num_heads, head_dim))
        query = jnp.einsum("BTD,DNH->BTNH", source, kernel.astype(x.dtype))

        down = Linear(c.kv_lora_rank + c.qk_rope_dim, ("embed", None), name="kv_down")(x)
        latent = RMSNorm(INNER_EPSILON, name="kv_norm")(down[..., : c.kv_lora_rank])
        angle = rope.angles(positions, dim=c.qk_rope_dim, theta=c.rope_theta)
        key_rope = rope.rotate_interleaved(down[..., None, c.kv_lora_rank :], angle)[:, :, 0]
        q_rope = rope.rotate_interleaved(query[..., c.qk_nope_dim :], angle)
        q_nope = query[..., : c.qk_nope_dim]

        init = named(fan_in(), None, "heads", None)
        kv_up = self.param("kv_up", init, (c.kv_lora_rank, c.num_heads, c.qk_nope_dim + c.v_head_dim))
        kv_up = kv_up.astype(x.dtype)
        if cache is None:
            mixed = expanded_attention(q_nope, q_rope, latent, key_rope, kv_up, mask=mask, scale=c.scale)
        else:
            assert length is not None
            cache = (
                jax.lax.dynamic_update_slice_in_dim(cache[0], latent, length, axis=1),
                jax.lax.dynamic_update_slice_in_dim(cache[1], key_rope, length, axis=1),
            )
            mixed = absorbed_attention(q_nope, q_rope, *cache, kv_up, mask=mask, scale=c.scale)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed")
        out = self.param("output", init, (c.num_heads, c.v_head_dim, width))
        return jnp.einsum("BTNV,NVD->BTD", mixed, out.astype(x.dtype)), cache
