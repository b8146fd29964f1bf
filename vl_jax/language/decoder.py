"""The language model: pre-norm decoder with latent attention, dense layers first, then sparse ones.

    x -> [gate: + what vision says] -> + attention(norm) -> + SwiGLU or experts(norm) -> ... -> norm

Layers of one kind are stacked and scanned: parameters, routing state, cache and statistics carry a leading
layer axis, so compile time does not grow with depth.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.fusion.gate import CrossModalGate, CrossModalGateConfig
from vl_jax.language.mla import MLA, MLAConfig
from vl_jax.moe.layer import DynamicMoE, MoEOutput
from vl_jax.moe.routing import MoEConfig, RoutingContext, State
from vl_jax.nn.cache import LatentCache
from vl_jax.nn.layers import Linear, RMSNorm, SwiGLU, named
from vl_jax.sharding import constrain

Leaf = Any
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Defaults are DeepSeek-VL2 (base)."""

    vocab_size: int = 129_280
    embed_dim: int = 2560
    mlp_dim: int = 12_288  # hidden width of the dense layers
    num_layers: int = 30
    num_dense_layers: int = 1  # the first layers, without experts
    attention: MLAConfig = MLAConfig()
    norm_epsilon: float = 1e-6
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} must be from 0 to num_layers={self.num_layers}"
            )


@struct.dataclass
class LayerContext:
    """What every layer reads and none changes."""

    positions: Leaf  # i32[B T]
    mask: Leaf  # bool[B T S]
    routing: RoutingContext
    vision: Leaf | None  # [B S D] visual tokens, for the gate
    vision_mask: Leaf | None  # bool[B T S]
    length: Leaf | None  # i32[] filled slots of the cache


@struct.dataclass
class LayerState:
    """What belongs to one layer and is not a parameter; stacked over layers outside the scan."""

    routing: State  # state of the routing scheme; empty for a dense layer
    cache: Leaf | None  # (latent, key_rope) of this layer


class DecoderLayer(nn.Module):
    """One decoder layer; ``moe`` None makes it dense."""

    config: DecoderConfig
    moe: MoEConfig | None
    gate: CrossModalGateConfig | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], state: LayerState, context: LayerContext
    ) -> tuple[Float[Array, "B T D"], tuple[Leaf | None, MoEOutput | None]]:
        c = self.config
        if self.gate is not None:
            assert context.vision is not None and context.vision_mask is not None
            x = x + CrossModalGate(self.gate, name="gate")(x, context.vision, context.vision_mask)
        mixed, cache = MLA(c.attention, name="attention")(
            RMSNorm(c.norm_epsilon, name="attention_norm")(x),
            positions=context.positions,
            mask=context.mask,
            cache=state.cache,
            length=context.length,
        )
        x = constrain(x + mixed, "batch", None, None)
        normed = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        routed = None
        if self.moe is None:
            y = SwiGLU(c.mlp_dim, name="mlp")(normed)
        else:
            y, routed = DynamicMoE(self.moe, name="moe")(normed, context.routing, state.routing)
        return constrain(x + y, "batch", None, None), (cache, routed)


class Decoder(nn.Module):
    """Embeddings in, normalised hidden states out; ``embed`` and ``logits`` are its two ends."""

    config: DecoderConfig
    moe: MoEConfig
    gate: CrossModalGateConfig | None
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        c = self.config
        init = named(nn.initializers.normal(0.02), "vocab", "embed")
        self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim))
        if c.num_dense_layers:
            self.dense_layers = self._stack(c.num_dense_layers, None)
        if self.num_sparse_layers:
            self.moe_layers = self._stack(self.num_sparse_layers, self.moe)
        self.norm = RMSNorm(c.norm_epsilon)
        self.head = Linear(c.vocab_size, ("embed", "vocab"))

    @property
    def num_sparse_layers(self) -> int:
        return self.config.num_layers - self.config.num_dense_layers

    def _stack(self, length: int, moe: MoEConfig | None) -> nn.Module:
        layer = DecoderLayer
        if self.config.remat != "none":
            layer = nn.remat(layer, prevent_cse=False, policy=REMAT_POLICIES[self.config.remat])
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.config, moe, self.gate)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Gathered along the width first: a lookup in a table cut both ways makes the partitioner replicate.
        table = constrain(self.embedding.astype(self.dtype), "vocab", None)
        return constrain(table[tokens], "batch", None, None)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Vocabulary scores in float32."""
        return constrain(self.head(hidden).astype(jnp.float32), "batch", None, "vocab")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: LayerContext,
        routing_state: State,
        cache: LatentCache | None,
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None, LatentCache | None]:
        """Runs the layers.

        Args:
          routing_state: state of the scheme, stacked over the sparse layers.
          cache: latents of the tokens so far (their segments already appended), or None in training.

        Returns:
          Hidden states after the final norm, what the sparse layers returned (stacked), and the new cache.
        """
        dense = self.config.num_dense_layers
        kept = None if cache is None else (cache.latent, cache.key_rope)
        first, rest = jax.tree.map(lambda a: a[:dense], kept), jax.tree.map(lambda a: a[dense:], kept)
        routed = None
        if dense:
            x, (first, _) = self.dense_layers(x, LayerState({}, first), context)
        if self.num_sparse_layers:
            x, (rest, routed) = self.moe_layers(x, LayerState(routing_state, rest), context)
        if cache is not None:
            latent, key_rope = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)
            length = cache.length + x.shape[1]
            cache = dataclasses.replace(cache, latent=latent, key_rope=key_rope, length=length)
        return self.norm(x), routed, cache
