"""The pre-norm transformer that image and text encoders share, whatever stands before and after it.

Every block is ``x + attention(norm1(x))``, then ``x + fc2(activation(fc1(norm2(x))))``.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.kernels.activation import FUNCTIONS, Kind
from vl_jax.nn import attention
from vl_jax.nn.layers import LayerNorm, Linear, fan_in, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One block of an encoder."""

    embed_dim: int
    mlp_dim: int
    num_heads: int
    activation: Kind
    norm_epsilon: float
    qkv_bias: bool = True

    def __post_init__(self):
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}")


@struct.dataclass
class Encoded:
    """What an encoder makes of its input."""

    tokens: Leaf  # [B T D], after the final norm where the encoder has one for every token
    pooled: Leaf  # [B E], or None
    states: tuple[Leaf, ...] = ()  # [B T D] each: the hidden states that the config asks for


class Attention(nn.Module):
    """Multi-head attention from ``x`` to ``source``, or to ``x`` itself."""

    num_heads: int
    qkv_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"] | None = None,
        *,
        mask: Bool[Array, "B #T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        width, heads = x.shape[-1], self.num_heads
        shape = (width, 3, heads, width // heads)
        init = named(fan_in(), "embed", None, "heads", None, inputs=(0,))
        qkv = self.param("qkv", init, shape).astype(x.dtype)
        bias = jnp.zeros(shape[1:], x.dtype)
        if self.qkv_bias:
            init = named(nn.initializers.zeros, None, "heads", None)
            bias = self.param("qkv_bias", init, shape[1:]).astype(x.dtype)
        if source is None:
            query, key, value = jnp.einsum("BTD,DXNH->XBTNH", x, qkv) + bias[:, None, None]
        else:
            query = jnp.einsum("BTD,DNH->BTNH", x, qkv[:, 0]) + bias[0]
            key, value = jnp.einsum("BSD,DXNH->XBSNH", source, qkv[:, 1:]) + bias[1:, None, None]
        scale = query.shape[-1] ** -0.5
        if self.is_mutable_collection("intermediates"):
            weights = attention.attention_weights(query, key, mask=mask, scale=scale)
            self.sow("intermediates", "weights", weights)
        mixed = attention.attend(query, key, value, mask=mask, scale=scale)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        project = self.param("project", init, (heads, width // heads, width)).astype(x.dtype)
        bias = self.param("project_bias", named(nn.initializers.zeros, "embed"), (width,)).astype(x.dtype)
        return jnp.einsum("BTNH,NHD->BTD", mixed, project) + bias


def feed_forward(x: Float[Array, "B T D"], config: BlockConfig) -> Float[Array, "B T D"]:
    """Two projections, ``fc1`` and ``fc2``, that belong to the module which calls this."""
    hidden = Linear(config.mlp_dim, ("embed", "mlp"), use_bias=True, name="fc1")(x)
    hidden = FUNCTIONS[config.activation](hidden)
    return Linear(config.embed_dim, ("mlp", "embed"), use_bias=True, name="fc2")(hidden)


class Block(nn.Module):
    """One block; ``keep`` returns its output once more, for a scan to stack."""

    config: BlockConfig
    keep: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B #T T"] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"] | None]:
        c = self.config
        attend = Attention(c.num_heads, c.qkv_bias, name="attention")
        x = x + attend(LayerNorm(c.norm_epsilon, name="norm1")(x), mask=mask)
        x = x + feed_forward(LayerNorm(c.norm_epsilon, name="norm2")(x), c)
        x = constrain(x, "batch", None, None)
        return x, x if self.keep else None


def run_blocks(
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B #T T"] | None,
    config: BlockConfig,
    *,
    num_layers: int,
    states: tuple[int, ...] = (),
    remat: bool = False,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...]]:
    """Runs a stack, ``blocks``, that belongs to the module which calls this.

    Args:
      states: hidden states to return too: 0 is the input, i the output of block i, negative ones count
        from the last.
      remat: keep only the inputs of blocks for the backward pass.
    """
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    stack = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    y, outputs = stack(config, bool(states), name="blocks")(x, mask)
    if outputs is None:
        return y, ()
    numbers = (i % (num_layers + 1) for i in states)
    return y, tuple(outputs[i - 1] if i else x for i in numbers)
