"""The encoder-decoder: T5 (arXiv 1910.10683), whose sparse form is the Switch Transformer (arXiv 2101.03961).

    source [S] -> embed -> (+ attention, + MLP or experts) x L -> norm -> encoded [S D] --.
                                                                                          v
    target [T] -> embed -> (+ causal attention, + attention to encoded, + MLP or experts) x L -> norm -> head

Each part reads the norm of what it is added to.

Positions enter the scores of self-attention (see ``biased_attention``); those of attention to the source know
none.

Experts are those of ``DynamicMoE``. The Switch Transformer's have top_k=1, ungated ReLU and ``limit.slots``:
a token that finds no slot keeps what it was, for its experts add zero.

How rows of a ``Batch`` become source and target is said in ``text_to_text``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import TEXT
from vl_jax.kernels.activation import Activation
from vl_jax.language.biased_attention import BiasedAttention, offset_bias, position_bias
from vl_jax.language.decoder import REMAT_POLICIES, LayerRun
from vl_jax.moe.layer import (
    Carried,
    DynamicMoE,
    MoEOutput,
    carried_apart,
    carry,
    first_logits,
    handed_on,
    of_layer,
)
from vl_jax.moe.routing import MoEConfig, RoutingContext, State
from vl_jax.nn import cache as cache_lib
from vl_jax.nn import packed
from vl_jax.nn.cache import Cache
from vl_jax.nn.layers import GatedMLP, Linear, RMSNorm, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain

NO_STATE: State = {}


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


@struct.dataclass
class SourceView:
    """What a decoder attends to besides itself: hidden states, or what its layers have made of them."""

    mask: Leaf  # bool[B #T S]
    tokens: Leaf | None = None  # [B S D]
    projected: Leaf | None = None  # for each run of layers keys and values, [B L S N H] both


@struct.dataclass
class BlockContext:
    """What every layer of a stack reads and none changes."""

    bias: Leaf  # f32[1 N T S]
    mask: Leaf  # bool[B #T S]
    source: SourceView | None
    routing: RoutingContext
    keep: bool = struct.field(pytree_node=False, default=False)  # keys and values are wanted, for a cache


@struct.dataclass
class BlockState:
    """What belongs to one layer and is not a parameter; stacked over layers outside the scan."""

    routing: State  # state of the routing scheme; empty for a dense layer
    cached: Leaf | None  # keys and values of the tokens before, unless there are none
    number: Leaf  # i32[] of the layer in its stack


class CrossBlock(nn.Module):
    """One layer; ``moe`` None makes it dense, a context without source makes it an encoder's."""

    config: EncoderDecoderConfig
    moe: MoEConfig | None
    depth: int  # layers of its stack

    @nn.compact
    def __call__(
        self,
        carried: Carried,
        state: BlockState,
        projected: Leaf | None,
        context: BlockContext,
    ) -> tuple[Carried, tuple[Leaf | None, MoEOutput | None]]:
        """Takes and returns x [B T D], with the router logits that are handed on if anyone asks for them."""
        (x, previous), c, source, routed = carried_apart(carried), self.config, context.source, None
        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        attend = BiasedAttention(c.num_heads, c.head_dim, name="attention")
        mixed, kept = attend(normed, mask=context.mask, bias=context.bias, cached=state.cached)
        x = x + mixed
        if source is not None:
            normed = RMSNorm(c.norm_epsilon, name="cross_norm")(x)
            attend = BiasedAttention(c.num_heads, c.head_dim, name="cross_attention")
            x = x + attend(normed, source.tokens, mask=source.mask, projected=projected)[0]
        x = constrain(x, "batch", None, None)
        normed = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        if self.moe is None:
            y = GatedMLP(c.mlp_dim, c.activation, name="mlp")(normed)
        else:
            where = of_layer(context.routing, previous, state.number, self.depth)
            y, routed = DynamicMoE(self.moe, name="moe")(normed, where, state.routing)
            previous, routed = handed_on(routed)
        x = constrain(x + y, "batch", None, None)
        return carry(x, previous), (kept if context.keep else None, routed)


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
        mask: Bool[Array, "B #T S"],
        routing: RoutingContext,
        routing_state: State,
        source: SourceView | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None, tuple[Leaf, ...]]:
        """Runs the layers.

        Args:
          routing_state: state of the scheme, stacked over the sparse layers.
          cache: keys and values of the tokens before, which the mask begins with.

        Returns:
          Hidden states, what the sparse layers returned (stacked), and for each run of layers the keys and
          values of the new tokens, if there is a cache for them.
        """
        c = self.config
        init = named(nn.initializers.normal(c.embed_dim**-0.5), None, "heads")
        table = self.param("position_bias", init, (c.num_buckets, c.num_heads))
        bias = self._bias(table, x.shape[1], cache)
        self.sow("intermediates", "bias", bias)
        context = BlockContext(bias, mask, source, routing, keep=cache is not None)
        before = [None] * len(self.layers.runs) if cache is None or cache.empty else cache.runs
        crossed = [None] * len(before) if source is None or source.projected is None else source.projected
        kept, routed, first_sparse = [], [], 0
        sparse = any(run.sparse for run in self.layers.runs)
        carried = carry(x, first_logits(self.moe if sparse else None, x.shape[:2]))
        for run, cached, projected in zip(self.layers.runs, before, crossed, strict=True):
            own = slice(first_sparse, first_sparse + len(run.layers) * run.sparse)
            first_sparse = own.stop
            state = jax.tree.map(lambda a, s=own: a[s], routing_state) if run.sparse else {}
            before_run = BlockState(state, cached, jnp.array(run.layers, jnp.int32))
            carried, (kept_here, routed_here) = self._run(run)(carried, before_run, projected, context)
            kept.append(kept_here)
            routed += [routed_here] * run.sparse
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routed) if routed else None
        return RMSNorm(c.norm_epsilon, name="norm")(carried_apart(carried)[0]), stacked, tuple(kept)

    def _bias(self, table: jax.Array, length: int, cache: Cache | None) -> jax.Array:
        options = {"max_distance": self.config.max_distance, "bidirectional": not self.causal}
        if cache is None or cache.empty:
            return position_bias(table, length, **options)
        slots = cache.segment_ids.shape[1]
        new = cache.length + jnp.arange(length)
        offsets = jnp.concatenate([jnp.arange(slots), new]) - new[:, None]
        return offset_bias(table, offsets, farthest=slots + length, **options)

    def _run(self, run: LayerRun) -> nn.Module:
        remat = self.config.remat
        policy = REMAT_POLICIES.get(remat)
        block = packed.layer_of(CrossBlock, self, run.name, remat=remat != "none", policy=policy)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "routing": True},  # "routing": noise of schemes, in training
            in_axes=(0, 1, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=len(run.layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        depth = sum(len(run.layers) for run in self.layers.runs)
        return scanned(self.config, self.moe if run.sparse else None, depth, name=run.name)


@struct.dataclass
class EncoderDecoderOutput:
    """Scores of the next target token, what leaves both stacks, and what their sparse layers returned."""

    logits: Leaf  # f32[B T V]
    encoded: Leaf  # [B S D]
    hidden: Leaf  # [B T D]
    encoder_routed: MoEOutput | None  # stacked over the sparse layers
    decoder_routed: MoEOutput | None


class EncoderDecoder(nn.Module):
    """The model; ``encode``, ``decode`` and ``logits`` are its parts."""

    config: EncoderDecoderConfig
    moe: MoEConfig
    decoder_moe: MoEConfig | None = None  # None: as the encoder's
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        c = self.config
        if c.tie_embeddings:
            self.embedding = self._table("embedding")
        else:
            self.source_embedding = self._table("source_embedding")
            self.target_embedding = self._table("target_embedding")
            self.head = Linear(c.vocab_size, ("embed", "vocab"), hidden=False)
        self.encoder = BlockStack(c, c.encoder, self.moe, causal=False)
        self.decoder = BlockStack(c, c.decoder, self.decoder_moe or self.moe, causal=True)

    def encode(
        self,
        source: Int[Array, "B S"],
        valid: Bool[Array, "B S"] | None = None,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        routing_state: State = NO_STATE,
    ) -> tuple[Float[Array, "B S D"], MoEOutput | None]:
        """Hidden states of the source.

        Args:
          valid: False on padding, which nothing attends to.
          segment_ids: tokens attend to those of their own segment only; None: a row is one.
          positions: of the tokens in their segments, for routing; None: from 0.
          routing_state: state of the scheme, stacked over the sparse layers.
        """
        table = self.embedding if self.config.tie_embeddings else self.source_embedding
        valid = _or_all(valid, source)
        mask = valid[:, None]
        if segment_ids is not None:
            mask = mask & same_segment(segment_ids, segment_ids)
        routing = self._routing(source, valid, positions)
        return self.encoder(self._embed(table, source), mask, routing, routing_state)[:2]

    def decode(
        self,
        target: Int[Array, "B T"],
        source: SourceView,
        valid: Bool[Array, "B T"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        routing_state: State = NO_STATE,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None, Cache | None]:
        """Hidden states of the target, each of which knows the tokens up to its own, and the source.

        Args:
          cache: if given, the tokens are appended to it. For the other arguments see ``encode``.
        """
        table = self.embedding if self.config.tie_embeddings else self.target_embedding
        valid = _or_all(valid, target)
        segments = valid.astype(jnp.int32) if segment_ids is None else segment_ids
        if cache is not None:
            mask = cache_lib.causal_mask(cache, segments)
        else:
            mask = valid[:, None] & jnp.tril(jnp.ones((target.shape[1],) * 2, bool))
            if segment_ids is not None:
                mask = mask & same_segment(segment_ids, segment_ids)
        routing, x = self._routing(target, valid, positions), self._embed(table, target)
        hidden, routed, kept = self.decoder(x, mask, routing, routing_state, source, cache)
        if cache is not None:
            cache = cache_lib.append(cache, kept, segments)
        return hidden, routed, cache

    def project(self, encoded: Float[Array, "B S D"]) -> tuple[tuple[Leaf, Leaf], ...]:
        """Keys and values [B L S N H] that the decoder's layers make of a source, for each run of layers."""
        weights = self.decoder.variables["params"]
        kernels = [weights[run.name]["cross_attention"] for run in self.config.decoder.runs]

        def heads(kernel: Float[Array, "L D N H"]) -> Float[Array, "B L S N H"]:
            return jnp.einsum("BSD,LDNH->BLSNH", encoded, kernel.astype(encoded.dtype))

        return tuple((heads(of["key"]), heads(of["value"])) for of in kernels)

    def _routing(
        self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], positions: Int[Array, "B T"] | None
    ) -> RoutingContext:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return RoutingContext(
            valid=jnp.ones_like(valid) if self.config.route_padding else valid,
            modality=jnp.full(tokens.shape, TEXT, jnp.int32),
            tokens=tokens,
            positions=positions,
        )

    def _table(self, name: str) -> jax.Array:
        # Of variance 1, for nothing else scales what enters the first layer.
        init = named(nn.initializers.normal(1.0), "vocab", "embed")
        return self.param(name, init, (self.config.vocab_size, self.config.embed_dim))

    def _embed(self, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Gathered along the width first: a lookup in a table cut both ways makes the partitioner replicate.
        return constrain(constrain(table.astype(self.dtype), "vocab", None)[tokens], "batch", None, None)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Vocabulary scores in float32; a tied table has variance 1, which a factor undoes."""
        if self.config.tie_embeddings:
            scaled, kernel = self.head_inputs(hidden)
            scores = scaled @ kernel.astype(hidden.dtype)
        else:
            scores = self.head(hidden)
        return constrain(scores.astype(jnp.float32), "batch", None, "vocab")

    def head_inputs(self, hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """What the scores are products of."""
        if self.config.tie_embeddings:
            return hidden * self.config.embed_dim**-0.5, self.embedding.T
        return hidden, self.head.variables["params"]["kernel"]

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
        seen = SourceView(_or_all(source_valid, source)[:, None], encoded)
        hidden, decoder_routed, _ = self.decode(target, seen, target_valid)
        return EncoderDecoderOutput(self.logits(hidden), encoded, hidden, encoder_routed, decoder_routed)


def same_segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Which keys are of a query's segment."""
    return queries[:, :, None] == keys[:, None, :]


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
