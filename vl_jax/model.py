"""The vision-language model: encoder, adapter, fusion and language model, from a ``Batch`` to hidden states.

    Batch.tiles --ViT--> patches --Adapter--> visual tokens --fusion--> Decoder --> hidden --> logits

With a second tower for high resolution, an aligner joins what both of them see before it gets to the adapter.
Fusion is a choice of the config. ``prefix``: visual tokens stand in the sequence (DeepSeek-VL2). ``gated``:
they stay outside, and between decoder layers text attends to them through the cross-modal gate.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.batch import Batch
from vl_jax.encoders.adapter import Adapter, AdapterConfig
from vl_jax.encoders.high_resolution import HighResolution, HighResolutionConfig, HybridAligner
from vl_jax.encoders.vit import ViT, ViTConfig
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.language.decoder import Decoder, DecoderConfig, LayerContext
from vl_jax.moe import routing
from vl_jax.moe.layer import MoEOutput
from vl_jax.moe.routing import MoEConfig, RoutingContext, State
from vl_jax.nn import attention
from vl_jax.nn import cache as cache_lib
from vl_jax.nn.cache import Cache
from vl_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """How visual tokens meet text."""

    kind: Literal["prefix", "gated"] = "prefix"
    gate: CrossModalGateConfig = CrossModalGateConfig()  # used by ``gated``


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """The whole model. Defaults are DeepSeek-VL2 (base)."""

    encoder: ViTConfig | None = ViTConfig()  # None: a language model
    high_resolution: HighResolutionConfig | None = None  # a second tower, for ``Batch.high_tiles``
    adapter: AdapterConfig = AdapterConfig()
    fusion: FusionConfig = FusionConfig()
    language: DecoderConfig = DecoderConfig()
    moe: MoEConfig = MoEConfig(
        scheme="loss_free",
        num_experts=72,
        expert_dim=1536,
        normalize_gates=True,
        gate_scale=2.0,
        balance_weight=1e-4,
    )
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32

    def __post_init__(self):
        if self.encoder is None:
            if self.high_resolution is not None:
                raise ValueError("high_resolution needs an encoder, whose tokens its own are joined with")
            return
        left, high = self._tokens_left, self.high_resolution
        if left < 1:
            raise ValueError(f"adapter.skip={self.adapter.skip} leaves none of the tokens of the encoder")
        if self.adapter.downsample > 1 and left != self.encoder.grid**2:
            raise ValueError(f"adapter.downsample={self.adapter.downsample}: {left} tokens are not a square")
        if high is not None and high.grid**2 != left + self.adapter.skip:
            raise ValueError(
                f"high_resolution.grid={high.grid}: the encoder has {left + self.adapter.skip} tokens, not "
                f"{high.grid**2}"
            )

    @property
    def _tokens_left(self) -> int:
        """The tokens of a tile that the adapter does not skip."""
        assert self.encoder is not None
        without_class = self.encoder.class_token and not self.encoder.class_feature
        return self.encoder.num_tokens - without_class - self.adapter.skip

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of one tile, without those that stand between its rows; 0 for a language model."""
        if self.encoder is None:
            return 0
        if self.adapter.downsample == 1:
            return self._tokens_left
        return self.adapter.tokens_side(self.encoder.grid) ** 2

    @property
    def tile_tokens_side(self) -> int:
        """Visual tokens on the side of one tile, whose rows end with a newline; 0 for a language model.

        Raises:
          ValueError: the tokens form no square, or there is no vector for the newline.
        """
        if self.encoder is None:
            return 0
        if not self.adapter.separators or self._tokens_left != self.encoder.grid**2:
            raise ValueError(
                f"adapter.separators={self.adapter.separators}, {self._tokens_left} tokens of a tile: rows "
                "that end with a newline need separators, and tokens that form a square"
            )
        return self.adapter.tokens_side(self.encoder.grid)

    @property
    def num_sparse_layers(self) -> int:
        return len(self.language.sparse_layers)


@struct.dataclass
class ModelOutput:
    """Hidden states and what the sparse layers returned."""

    hidden: Leaf  # [B T D] after the final norm
    routed: MoEOutput | None  # stacked over sparse layers
    cache: Cache | None


class VisionLanguage(nn.Module):
    """The model; ``__call__`` is the training and prefill pass, ``decode`` one step over the cache."""

    config: VisionLanguageConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if c.encoder is not None:
            self.encoder = ViT(c.encoder, dtype, remat=c.language.remat != "none")
            self.adapter = Adapter(c.adapter, c.language.embed_dim)
        if c.high_resolution is not None:
            self.high = HighResolution(c.high_resolution, dtype, remat=c.language.remat != "none")
            self.aligner = HybridAligner(c.language.embed_dim)
        gate = c.fusion.gate if c.fusion.kind == "gated" else None
        self.language = Decoder(c.language, c.moe, gate, dtype)

    def see(self, batch: Batch) -> Float[Array, "B S D"]:
        """The visual tokens of every row, in reading order; zeros where a row has none."""
        rows, tiles = batch.tiles.shape[:2]
        if self.config.encoder is None:
            return jnp.zeros((*batch.visual_index.shape, self.config.language.embed_dim), self.config.dtype)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch.tiles, batch.high_tiles))
        patches = self.encode(*flat)
        return self.adapter(patches.reshape(rows, tiles, *patches.shape[1:]), batch.visual_index)

    def encode(self, tiles: Leaf, high_tiles: Leaf = None) -> Float[Array, "M P W"]:
        """The patches of every tile [M h w c], joined with those of the second tower if there is one.

        Raises:
          ValueError: there is a second tower, and no normalised pixels for it.
        """
        if self.config.high_resolution is None:
            return self.encoder(tiles)
        if high_tiles is None or not jnp.issubdtype(high_tiles.dtype, jnp.floating):
            found = None if high_tiles is None else high_tiles.dtype
            raise ValueError(f"high_tiles={found}: the high-resolution tower needs normalised floats")
        return self.aligner(self.encoder(tiles), self.high(high_tiles))

    def __call__(
        self,
        batch: Batch,
        routing_state: State,
        *,
        vision: Float[Array, "B S D"] | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Hidden states for every position of the batch.

        Args:
          routing_state: as ``init_routing_state`` makes it.
          vision: the visual tokens, if ``see`` already ran.
          cache: if given, the batch is appended to it (a row's segment must not begin before).
        """
        vision = self.see(batch) if vision is None else vision
        x = self.embed(batch, vision)
        gated = self.config.fusion.kind == "gated"
        if cache is None:
            mask, offset = attention.causal_mask(batch.segment_ids, batch.branch_ids), 0
        else:
            mask, offset = cache_lib.causal_mask(cache, batch.segment_ids), cache.length
        context = LayerContext(
            positions=batch.positions,
            mask=mask,
            routing=RoutingContext(
                valid=batch.segment_ids > 0,
                modality=batch.modality,
                tokens=batch.tokens,
                positions=batch.positions,
            ),
            vision=vision if gated else None,
            vision_mask=_vision_mask(batch, offset) if gated else None,
            length=None if cache is None else cache.length,
        )
        hidden, routed, kept = self.language(x, context, routing_state, cache)
        if cache is not None:
            cache = cache_lib.append(cache, kept, batch.segment_ids)
        return ModelOutput(hidden, routed, cache)

    def embed(self, batch: Batch, vision: Float[Array, "B S D"]) -> Float[Array, "B T D"]:
        """What enters the decoder: embeddings of text, with ``prefix`` fusion visual tokens among them."""
        x = self.language.embed(batch.tokens)
        if self.config.fusion.kind == "gated" or self.config.encoder is None:
            return x
        return merge_visual(x, vision, batch.visual_slot)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Vocabulary scores, float32."""
        return self.language.logits(hidden)

    def cross_entropy(
        self, hidden: Float[Array, "B Q D"], targets: Int[Array, "B Q"], weights: Float[Array, "B Q"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The weighted sums of cross-entropy and of hits (see ``losses.head_cross_entropy``)."""
        return self.language.cross_entropy(hidden, targets, weights)

    def initialize(self, batch: Batch, routing_state: State) -> Float[Array, "B T V"]:
        """Touches every parameter once; the method to call ``init`` with."""
        return self.logits(self(batch, routing_state).hidden)


def _vision_mask(batch: Batch, offset: Any) -> jax.Array:
    return attention.cross_mask(
        batch.segment_ids, batch.visual_start, batch.visual_segment_ids, offset=offset
    )


def merge_visual(
    x: Float[Array, "B T D"], vision: Float[Array, "B S D"], visual_slot: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Puts visual token ``visual_slot`` where it is set, the text embedding elsewhere."""
    index = jnp.maximum(visual_slot, 0)[..., None]
    placed = jnp.take_along_axis(vision, index, axis=1)
    return jnp.where(visual_slot[..., None] >= 0, placed.astype(x.dtype), x)


def init_routing_state(config: VisionLanguageConfig) -> State:
    """The routing scheme's initial state, stacked over the sparse layers."""
    state = routing.init_state(config.moe)
    return jax.tree.map(lambda a: jnp.repeat(a[None], config.num_sparse_layers, axis=0), state)


def update_routing_state(state: State, stats: Any, config: VisionLanguageConfig) -> State:
    """One step of the scheme's state per sparse layer, from statistics summed over the optimiser step."""
    return jax.vmap(lambda s, t: routing.update_state(s, t, config.moe))(state, stats) if state else state


def init_cache(config: VisionLanguageConfig, *, batch: int, slots: int) -> Cache:
    """An empty cache for ``slots`` tokens a row."""
    return cache_lib.create(
        runs=[len(run.layers) for run in config.language.runs],
        batch=batch,
        slots=slots,
        kept=config.language.attention.kept,
        dtype=jnp.dtype(config.dtype),
    )
