"""BERT (Devlin et al. 2018, arXiv 1810.04805): a text encoder that sees both ways, norms behind the sums.

    tokens [T] -> word + position + type -> norm -> blocks -> tokens [T D]
                                                          '-> first token -> dense -> tanh -> pooled [D]

Padding is neither attended to nor routed. As a tower all tokens are of the first type.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import TEXT
from vl_jax.encoders.language.tower import ReadsText, check_length
from vl_jax.encoders.text import who_sees_whom
from vl_jax.encoders.transformer import BlockConfig, Encoded, routing_context, run_blocks
from vl_jax.kernels.activation import FUNCTIONS, Kind
from vl_jax.moe.routing import MoEConfig, State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.layers import LayerNorm, Linear, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class BertConfig(ReadsText):
    """Defaults are BERT-Base, uncased."""

    vocab_size: int = 30_522
    max_length: int = 512
    token_types: int = 2  # kinds of tokens, such as those of the first and of the second sentence
    embed_dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-12
    causal: bool = False  # whether a token sees only those before it, as in a decoder
    pooler: bool = True  # the first token becomes the text as a vector; else the mean of all does
    moe: MoEConfig | None = None  # experts of the sparse blocks; every row is a routing group
    sparse_layers: tuple[int, ...] = ()  # numbers of the blocks with experts, ascending

    def __post_init__(self):
        if min(self.vocab_size, self.max_length, self.num_layers, self.token_types) < 1:
            raise ValueError(
                f"vocab_size={self.vocab_size}, max_length={self.max_length}, num_layers={self.num_layers}, "
                f"token_types={self.token_types}: must be >= 1"
            )
        _ = self.block  # checks its own fields

    @property
    def block(self) -> BlockConfig:
        """The blocks."""
        return BlockConfig.of(self, norms_follow=True)

    @property
    def stack(self) -> Stack | None:
        """The sparse blocks, if there are any."""
        return self.block.stack

    @property
    def pooled_dim(self) -> int:
        """Width of the text as one vector."""
        return self.embed_dim

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> Bert:
        """The module."""
        return Bert(self, jnp.dtype(dtype), remat)


class Bert(nn.Module):
    """The encoder."""

    config: BertConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        routing_state: State | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Encoded:
        """Encodes rows of tokens.

        Args:
          valid: tokens that may be attended to and that take experts; None: all of them.
          routing_state: state of the scheme, stacked over the sparse blocks.
          token_types: the kind of each token; None: the first of all.

        Raises:
          ValueError: the rows are longer than the position table.
        """
        c = self.config
        check_length(tokens.shape[1], c.max_length)
        x = self._embed(tokens, token_types)
        x = LayerNorm(c.norm_epsilon, name="embedded_norm")(x)
        x = constrain(x, "batch", None, None)
        counted = jnp.ones(tokens.shape, bool) if valid is None else valid
        x, _, routed = run_blocks(
            x,
            who_sees_whom(tokens, valid, causal=c.causal),
            c.block,
            context=routing_context(counted, modality=TEXT, tokens=tokens),
            routing_state=routing_state,
            remat=self.remat,
            owner=self,
        )
        if not c.pooler:
            return Encoded(x, None, routed=routed)
        dense = Linear(c.embed_dim, ("embed", None), use_bias=True, name="pooler")
        return Encoded(x, jnp.tanh(dense(x[:, 0])), routed=routed)

    def _embed(
        self, tokens: Int[Array, "B T"], token_types: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """What words, positions and types say, summed."""
        c, init = self.config, nn.initializers.normal(0.02)
        words = self.param("embedding", named(init, "vocab", "embed"), (c.vocab_size, c.embed_dim))
        positions = self.param("positions", named(init, None, "embed"), (c.max_length, c.embed_dim))
        types = self.param("types", named(init, None, "embed"), (c.token_types, c.embed_dim))
        types = types.astype(self.dtype)
        kind = types[0] if token_types is None else types[token_types]
        x = constrain(words.astype(self.dtype), "vocab", None)[tokens] + kind
        return x + positions[: tokens.shape[1]].astype(self.dtype)


@struct.dataclass
class BertPredictions:
    """What BERT is pretrained to say."""

    words: Leaf  # f32[B T V] scores of the word at each position
    follows: Leaf  # f32[B 2] scores that the second sentence follows the first, and that it does not
    encoded: Encoded


class BertPretraining(nn.Module):
    """The encoder with its two heads: the masked word, by the table of words, and the next sentence."""

    config: BertConfig
    tied: bool = True  # the table of words scores them too; False: one of its own

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> BertPredictions:
        """Scores in float32."""
        c = self.config
        encoder = Bert(c, name="encoder")
        encoded = encoder(tokens, valid, token_types=token_types)
        hidden = Linear(c.embed_dim, ("embed", None), use_bias=True, name="transform")(encoded.tokens)
        hidden = LayerNorm(c.norm_epsilon, name="norm")(FUNCTIONS[c.activation](hidden))
        if self.tied:
            table = nn.meta.unbox(encoder.get_variable("params", "embedding"))
        else:
            init = named(nn.initializers.normal(0.02), "vocab", "embed")
            table = self.param("words", init, (c.vocab_size, c.embed_dim))
        bias = self.param("words_bias", named(nn.initializers.zeros, "vocab"), (c.vocab_size,))
        words = jnp.einsum("BTD,VD->BTV", hidden, jnp.asarray(table, hidden.dtype)) + bias
        scores = Linear(2, ("embed", None), use_bias=True, hidden=False, name="follows")
        assert isinstance(encoded.pooled, jax.Array), "the next sentence is told from the pooled vector"
        return BertPredictions(words, scores(encoded.pooled), encoded)
