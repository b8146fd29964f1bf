"""The encoder-decoder: T5 (arXiv 1910.10683), whose sparse form is the Switch Transformer (arXiv 2101.03961).

    source [S] -> embed -> (+ attention, + MLP or experts) x L -> norm -> encoded [S D] --.
                                                                                          v
    target [T] -> embed -> (+ causal attention, + attention to encoded, + MLP or experts) x L -> norm -> head

Each part reads the norm of what it is added to.

Scores are not divided by sqrt(H); initialisation makes up for it. Positions enter as a number per head and
bucket of distances that is added to the scores of self-attention, the same in all layers of a stack.

Experts are those of ``DynamicMoE``. The Switch Transformer's have top_k=1, ungated ReLU and ``limit.slots``:
a token that finds no slot keeps what it was, for its experts add zero. Here is no state for routing schemes
to keep, and one scheme serves both stacks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import TEXT
from vl_jax.kernels.activation import Activation
from vl_jax.language.decoder import REMAT_POLICIES, LayerRun
from vl_jax.moe import routing
from vl_jax.moe.layer import DynamicMoE, MoEOutput
from vl_jax.moe.routing import MoEConfig, RoutingContext
from vl_jax.nn import attention
from vl_jax.nn.layers import GatedMLP, Linear, RMSNorm, fan_in, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """The layers of the encoder, or of the decoder."""

    num_layers: int = 12
    sparse_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)  # those with experts, by number

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be >= 1")
        if list(self.sparse_layers) != sorted({i for i in self.sparse_layers if 0 <= i < self.num_layers}):
            raise ValueError(
                f"sparse_layers={self.sparse_layers} must be increasing, from 0 to {self.num_layers - 1}"
            )

    @property
    def runs(self) -> tuple[LayerRun, ...]:
        """The layers in order, those of one kind together, named for the first and the last of them."""
        groups = itertools.groupby(range(self.num_layers), key=set(self.sparse_layers).__contains__)
        runs = ((is_sparse, tuple(group)) for is_sparse, group in groups)
        return tuple(LayerRun(f"layers_{run[0]}_{run[-1]}", is_sparse, run) for is_sparse, run in runs)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Defaults are Switch-Base."""

    vocab_size: int = 32_128
    embed_dim: int = 768
    mlp_dim: int = 3072  # hidden width of the dense layers
    num_heads: int = 12
    head_dim: int = 64
    encoder: StackConfig = StackConfig()
    decoder: StackConfig = StackConfig()
    num_buckets: int = 32  # of distances between tokens
    max_distance: int = 128  # from here on all distances share a bucket
    activation: Activation = Activation("relu", gated=False)  # of the dense layers
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True  # one table for source, target and head; False: three
    route_padding: bool = True  # padding takes slots of experts like any token, as in published models
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"num_buckets={self.num_buckets} must be >= 4, and max_distance={self.max_distance} more "
                "than half of them"
            )


# Positions.


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
    """What positions add to the scores of self-attention over ``length`` tokens, from a row per bucket.

    Offsets, ``2 length - 1`` of them, are put in buckets once, on the host.
    """
    offsets = np.arange(1 - length, length)
    buckets = distance_buckets(
        offsets, num_buckets=table.shape[0], max_distance=max_distance, bidirectional=bidirectional
    )
    by_offset = table.astype(jnp.float32)[buckets]
    order = jnp.arange(length)
    return jnp.moveaxis(by_offset[order - order[:, None] + length - 1], -1, 0)[None]


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    *,
    mask: Bool[Array, "B #T S"],
    bias: Float[Array, "1 N T S"] | None,
) -> Float[Array, "B N T S"]:
    """Softmax of ``query . key + bias`` in float32, not scaled."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    return attention.masked_softmax(scores if bias is None else scores + bias, mask[:, None])


# The modules.


@struct.dataclass
class BlockContext:
    """What every layer of a stack reads and none changes."""

    bias: Leaf  # f32[1 N T T]
    mask: Leaf  # bool[B #T T]
    source: Leaf | None  # [B S D] what a decoder attends to besides itself
    source_mask: Leaf  # bool[B 1 S], or None with it
    routing: RoutingContext


class BiasedAttention(nn.Module):
    """Attention from ``x`` to ``source``, or to ``x`` itself; scores are not scaled."""

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"],
        *,
        mask: Bool[Array, "B #T S"],
        bias: Float[Array, "1 N T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        width, heads, dim = x.shape[-1], self.num_heads, self.head_dim

        def project(name: str, tokens: jax.Array, scale: float = 1.0) -> jax.Array:
            init = named(fan_in(scale=scale), "embed", "heads", None, inputs=(0,))
            kernel = self.param(name, init, (width, heads, dim))
            return jnp.einsum("BTD,DNH->BTNH", tokens, kernel.astype(x.dtype))

        # The initial queries have the factor 1/sqrt(H) that scores lack.
        query = project("query", x, scale=1 / dim)
        key, value = project("key", source), project("value", source)
        weights = attention_weights(query, key, mask=mask, bias=bias)
        self.sow("intermediates", "weights", weights)
        mixed = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(value.dtype), value)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        output = self.param("output", init, (heads, dim, width)).astype(x.dtype)
        return jnp.einsum("BTNH,NHD->BTD", mixed, output)


class CrossBlock(nn.Module):
    """One layer; ``moe`` None makes it dense, a context without source makes it an encoder's."""

    config: EncoderDecoderConfig
    moe: MoEConfig | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: BlockContext
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None]:
        c, routed = self.config, None
        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        attend = BiasedAttention(c.num_heads, c.head_dim, name="attention")
        x = x + attend(normed, normed, mask=context.mask, bias=context.bias)
        if context.source is not None:
            normed = RMSNorm(c.norm_epsilon, name="cross_norm")(x)
            attend = BiasedAttention(c.num_heads, c.head_dim, name="cross_attention")
            x = x + attend(normed, context.source, mask=context.source_mask)
        x = constrain(x, "batch", None, None)
        normed = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        if self.moe is None:
            y = GatedMLP(c.mlp_dim, c.activation, name="mlp")(normed)
        else:
            y, routed = DynamicMoE(self.moe, name="moe")(normed, context.routing, {})
        return constrain(x + y, "batch", None, None), routed


class BlockStack(nn.Module):
    """The encoder, or, ``causal``, the decoder: embeddings in, normalised hidden states out."""

    config: EncoderDecoderConfig
    layers: StackConfig
    moe: MoEConfig
    causal: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        source: Float[Array, "B S D"] | None = None,
        source_valid: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None]:
        c, shape = self.config, x.shape[:2]
        init = named(nn.initializers.normal(c.embed_dim**-0.5), None, "heads")
        table = self.param("position_bias", init, (c.num_buckets, c.num_heads))
        bias = position_bias(table, shape[1], max_distance=c.max_distance, bidirectional=not self.causal)
        self.sow("intermediates", "bias", bias)
        mask = valid[:, None]
        if self.causal:
            mask = mask & jnp.tril(jnp.ones((shape[1], shape[1]), bool))
        routed_tokens = jnp.ones_like(valid) if c.route_padding else valid
        context = BlockContext(
            bias=bias,
            mask=mask,
            source=source,
            source_mask=None if source_valid is None else source_valid[:, None],
            routing=RoutingContext(valid=routed_tokens, modality=jnp.full(shape, TEXT, jnp.int32)),
        )
        routed = []
        for run in self.layers.runs:
            x, output = self._run(run)(x, context)
            routed += [output] * run.sparse
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routed) if routed else None
        return RMSNorm(c.norm_epsilon, name="norm")(x), stacked

    def _run(self, run: LayerRun) -> nn.Module:
        block = CrossBlock
        if self.config.remat != "none":
            block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[self.config.remat])
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=len(run.layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.config, self.moe if run.sparse else None, name=run.name)


@struct.dataclass
class EncoderDecoderOutput:
    """Scores of the next target token, what leaves both stacks, and what their sparse layers returned."""

    logits: Leaf  # f32[B T V]
    encoded: Leaf  # [B S D]
    hidden: Leaf  # [B T D]
    encoder_routed: MoEOutput | None  # stacked over the sparse layers
    decoder_routed: MoEOutput | None


class EncoderDecoder(nn.Module):
    """The model; ``encode``, ``decode`` and ``logits`` are its parts.

    Raises:
      ValueError: the routing scheme keeps state or needs token ids, or decides for a target token by later
        ones.
    """

    config: EncoderDecoderConfig
    moe: MoEConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        c = self.config
        if routing.init_state(self.moe):
            raise ValueError(f"scheme={self.moe.scheme!r} keeps state, for which there is no place here")
        if routing.scheme_of(self.moe).tokens:
            raise ValueError(f"scheme={self.moe.scheme!r} routes by token ids, which are not handed on here")
        if c.decoder.sparse_layers and not routing.is_causal(self.moe):
            raise ValueError(
                f"scheme={self.moe.scheme!r}, limit.priority={self.moe.limit.priority!r}: a decoder's must "
                "be causal"
            )
        if c.tie_embeddings:
            self.embedding = self._table("embedding")
        else:
            self.source_embedding = self._table("source_embedding")
            self.target_embedding = self._table("target_embedding")
            self.head = Linear(c.vocab_size, ("embed", "vocab"), hidden=False)
        self.encoder = BlockStack(c, c.encoder, self.moe, causal=False)
        self.decoder = BlockStack(c, c.decoder, self.moe, causal=True)

    def encode(
        self, source: Int[Array, "B S"], valid: Bool[Array, "B S"] | None = None
    ) -> tuple[Float[Array, "B S D"], MoEOutput | None]:
        """Hidden states of the source; ``valid`` is False on padding, which nothing attends to."""
        table = self.embedding if self.config.tie_embeddings else self.source_embedding
        return self.encoder(self._embed(table, source), _or_all(valid, source))

    def decode(
        self,
        target: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        source_valid: Bool[Array, "B S"] | None = None,
        target_valid: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None]:
        """Hidden states of the target, each of which knows the tokens up to its own, and the source."""
        table = self.embedding if self.config.tie_embeddings else self.target_embedding
        source_valid = _or_all(source_valid, encoded[..., 0])
        return self.decoder(self._embed(table, target), _or_all(target_valid, target), encoded, source_valid)

    def _table(self, name: str) -> jax.Array:
        # Of variance 1, for nothing else scales what enters the first layer.
        init = named(nn.initializers.normal(1.0), "vocab", "embed")
        return self.param(name, init, (self.config.vocab_size, self.config.embed_dim))

    def _embed(self, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Gathered along the width first: a lookup in a table cut both ways makes the partitioner replicate.
        return constrain(constrain(table.astype(self.dtype), "vocab", None)[tokens], "batch", None, None)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Vocabulary scores in float32; a tied table has variance 1, which the factor undoes."""
        if self.config.tie_embeddings:
            scores = hidden * self.config.embed_dim**-0.5 @ self.embedding.astype(hidden.dtype).T
        else:
            scores = self.head(hidden)
        return constrain(scores.astype(jnp.float32), "batch", None, "vocab")

    def __call__(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        source_valid: Bool[Array, "B S"] | None = None,
        target_valid: Bool[Array, "B T"] | None = None,
    ) -> EncoderDecoderOutput:
        """The training pass; ``target`` is what the decoder reads, see ``shift_right``."""
        encoded, encoder_routed = self.encode(source, source_valid)
        hidden, decoder_routed = self.decode(target, encoded, source_valid, target_valid)
        return EncoderDecoderOutput(self.logits(hidden), encoded, hidden, encoder_routed, decoder_routed)


def _or_all(valid: Bool[Array, "B T"] | None, tokens: Array) -> Bool[Array, "B T"]:
    return jnp.ones(tokens.shape, bool) if valid is None else valid


def shift_right(labels: Int[Array, "B T"], *, start_id: int, pad_id: int) -> Int[Array, "B T"]:
    """What the decoder reads to predict ``labels``: those before each. Ignored ones (< 0) become padding."""
    shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    return jnp.where(shifted < 0, pad_id, shifted)


def router_logits(captured: Mapping[str, Any], layers: StackConfig) -> Float[Array, "L B T E"]:
    """The router logits of a stack's sparse layers, for ``balance.sequence_losses``.

    Args:
      captured: of the collection ``intermediates``, what belongs to the stack.
      layers: of the stack; it must have sparse layers.
    """
    return jnp.concatenate([captured[run.name]["moe"]["logits"][0] for run in layers.runs if run.sparse])
