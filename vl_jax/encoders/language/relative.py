"""A text encoder that knows distances in place of positions: T5's buckets (arXiv 1910.10683, section 2.1).

    tokens [T] -> embed -> blocks -> norm -> tokens [T D]

    score(i, j) = q_i . k_j / sqrt(H) + table[bucket of j - i]      one table for all blocks

Near distances have a bucket each, far ones share some, and what stands before has other buckets than what
stands behind. So it is of no account where a text stands in its row, and a text may be longer than any it was
trained on. Padding is neither attended to nor routed.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from vl_jax.batch import TEXT
from vl_jax.encoders.language.tower import ReadsText, check_length
from vl_jax.encoders.text import who_sees_whom
from vl_jax.encoders.transformer import BlockConfig, Encoded, routing_context, run_blocks
from vl_jax.kernels.activation import Kind
from vl_jax.language.biased_attention import position_bias
from vl_jax.moe.routing import MoEConfig, State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.layers import LayerNorm, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class RelativeTextConfig(ReadsText):
    """Defaults have the size of BERT-Base, and the buckets of T5."""

    vocab_size: int = 30_522
    max_length: int = 512  # no parameter depends on it
    embed_dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-6
    num_buckets: int = 32  # of distances, half of them for what stands before
    max_distance: int = 128  # from here on all distances share a bucket
    moe: MoEConfig | None = None  # experts of the sparse blocks; every row is a routing group
    sparse_layers: tuple[int, ...] = ()  # numbers of the blocks with experts, ascending

    def __post_init__(self):
        if min(self.vocab_size, self.max_length, self.num_layers) < 1:
            raise ValueError(
                f"vocab_size={self.vocab_size}, max_length={self.max_length}, num_layers={self.num_layers}: "
                "must be >= 1"
            )
        if self.num_buckets < 4 or self.num_buckets % 2 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets={self.num_buckets} must be even and >= 4, and "
                f"max_distance={self.max_distance} more than a quarter of them"
            )
        _ = self.block  # checks its own fields

    @property
    def block(self) -> BlockConfig:
        """The blocks."""
        return BlockConfig.of(self)

    @property
    def stack(self) -> Stack | None:
        """The sparse blocks, if there are any."""
        return self.block.stack

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> RelativeText:
        """The module."""
        return RelativeText(self, jnp.dtype(dtype), remat)


class RelativeText(nn.Module):
    """The encoder."""

    config: RelativeTextConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Encodes rows of tokens.

        Args:
          valid: tokens that may be attended to and that take experts; None: all of them.
          routing_state: state of the scheme, stacked over the sparse blocks.

        Raises:
          ValueError: the rows are longer than the config says.
        """
        c = self.config
        check_length(tokens.shape[1], c.max_length)
        init = named(nn.initializers.normal(0.02), "vocab", "embed")
        words = self.param("embedding", init, (c.vocab_size, c.embed_dim))
        init = named(nn.initializers.normal(0.02), None, "heads")
        distances = self.param("distances", init, (c.num_buckets, c.num_heads))
        bias = position_bias(distances, tokens.shape[1], max_distance=c.max_distance, bidirectional=True)
        x = constrain(words.astype(self.dtype), "vocab", None)[tokens]
        x = constrain(x, "batch", None, None)
        counted = jnp.ones(tokens.shape, bool) if valid is None else valid
        x, _, routed = run_blocks(
            x,
            who_sees_whom(tokens, valid, causal=False),
            c.block,
            bias=bias,
            context=routing_context(counted, modality=TEXT, tokens=tokens),
            routing_state=routing_state,
            remat=self.remat,
            owner=self,
        )
        return Encoded(LayerNorm(c.norm_epsilon, name="norm")(x), None, routed=routed)
