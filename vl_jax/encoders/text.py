"""Text encoders of image-text pairs: token ids in, one vector out.

    tokens [T] -> embedding + learned positions -> blocks -> norm -> pooling -> projection

CLIP's is causal and pools at the end-of-text token; SigLIP's sees all positions, padding too, and pools at
the last one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import TEXT
from vl_jax.encoders.language.tower import ReadsText
from vl_jax.encoders.transformer import BlockConfig, Encoded, Through, routing_context, run_blocks
from vl_jax.kernels.activation import Kind
from vl_jax.moe.routing import MoEConfig, State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.layers import LayerNorm, Linear, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(ReadsText):
    """Defaults are CLIP-ViT-B's."""

    vocab_size: int = 49_408
    max_length: int = 77
    embed_dim: int = 512
    mlp_dim: int = 2048
    num_layers: int = 12
    num_heads: int = 8
    activation: Kind = "quick_gelu"
    norm_epsilon: float = 1e-5
    causal: bool = True
    # Where the pooled vector is taken: the first end-of-text token, the first of the largest ids (the same,
    # where end-of-text has the largest id), or the last position.
    pooling: Literal["first_end", "largest_id", "last"] = "first_end"
    end_id: int = 49_407  # end of text, for ``first_end``
    sees_padding: bool = False  # padding is read like any token; all rows have ``max_length`` (SigLIP)
    projection_dim: int = 512  # 0: the pooled vector stays as it is
    projection_bias: bool = False
    moe: MoEConfig | None = None  # experts of the sparse blocks; every row is a routing group
    sparse_layers: tuple[int, ...] = ()  # numbers of the blocks with experts, ascending

    goes_through: ClassVar[bool] = True  # its module takes ``through``

    def __post_init__(self):
        if min(self.vocab_size, self.max_length, self.num_layers) < 1:
            raise ValueError(
                f"vocab_size={self.vocab_size}, max_length={self.max_length}, num_layers={self.num_layers}: "
                "must be >= 1"
            )
        _ = self.block  # checks its own fields

    @property
    def block(self) -> BlockConfig:
        return BlockConfig.of(self)

    @property
    def stack(self) -> Stack | None:
        """The sparse blocks, if there are any."""
        return self.block.stack

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector."""
        return self.projection_dim or self.embed_dim

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> TextEncoder:
        """The module."""
        return TextEncoder(self, jnp.dtype(dtype), remat)


def pooled_positions(tokens: Int[Array, "B T"], config: TextEncoderConfig) -> Int[Array, " B"]:
    """Where each row's vector is taken; the first position, if it has no end-of-text token."""
    if config.pooling == "last":
        return jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
    return jnp.argmax(tokens if config.pooling == "largest_id" else tokens == config.end_id, axis=1)


def who_sees_whom(
    tokens: Int[Array, "B T"], valid: Bool[Array, "B T"] | None, *, causal: bool
) -> Bool[Array, "B T T"] | None:
    """The attention mask; None where all see all."""
    if valid is None and not causal:
        return None
    mask = jnp.ones((*tokens.shape, tokens.shape[1]), bool)
    if causal:
        mask = jnp.tril(mask)
    return mask if valid is None else mask & valid[:, None, :]


class TextEncoder(nn.Module):
    """The encoder; every token comes back after the final norm, and the pooled vector projected."""

    config: TextEncoderConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        routing_state: State | None = None,
        *,
        through: Through | None = None,
    ) -> Encoded:
        """Encodes rows of tokens.

        Args:
          valid: tokens that may be attended to and that take experts; all of them, if not given or if the
            encoder sees padding.
          routing_state: state of the scheme, stacked over the sparse blocks.
          through: acts between the blocks; see ``run_blocks``.

        Raises:
          ValueError: the rows are longer than the position table.
        """
        c = self.config
        length = tokens.shape[1]
        valid = None if c.sees_padding else valid
        if length > c.max_length:
            raise ValueError(f"text of {length} tokens; the encoder has max_length={c.max_length} positions")
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", named(init, "vocab", "embed"), (c.vocab_size, c.embed_dim))
        positions = self.param("positions", named(init, None, "embed"), (c.max_length, c.embed_dim))
        x = constrain(table.astype(self.dtype), "vocab", None)[tokens]
        x = x + positions[:length].astype(self.dtype)
        self.sow("intermediates", "embedded", x)
        x = constrain(x, "batch", None, None)
        mask = who_sees_whom(tokens, valid, causal=c.causal)
        counted = jnp.ones(tokens.shape, bool) if valid is None else valid
        x, _, routed = run_blocks(
            x,
            mask,
            c.block,
            context=routing_context(counted, modality=TEXT, tokens=tokens),
            routing_state=routing_state,
            remat=self.remat,
            through=through,
            owner=self,
        )
        x = LayerNorm(c.norm_epsilon, name="norm")(x)
        pooled = self._project(take_positions(x, pooled_positions(tokens, c)))
        return Encoded(x, pooled, routed=routed)

    def _project(self, pooled: Float[Array, "B D"]) -> Float[Array, "B E"]:
        c = self.config
        if not c.projection_dim:
            return pooled
        names = ("embed", None)
        return Linear(c.projection_dim, names, use_bias=c.projection_bias, name="projection")(pooled)


def take_positions(x: Float[Array, "B T D"], positions: Int[Array, " B"]) -> Float[Array, "B D"]:
    """One token of every row."""
    return jnp.take_along_axis(x, positions[:, None, None], axis=1)[:, 0]
