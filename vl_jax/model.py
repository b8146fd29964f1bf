"""The vision-language model: encoder, adapter, fusion and language model, from a ``Batch`` to hidden states.

    Batch.tiles --encoder--> patches --Adapter--> visual tokens --fusion--> Decoder --> hidden --> logits

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
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import TILES, Batch, blank
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.encoders.adapter import Adapter, AdapterConfig, merge_visual, used_tiles
from vl_jax.encoders.build import AnyEncoder
from vl_jax.encoders.high_resolution import HighResolution, HighResolutionConfig, ResolutionAligner
from vl_jax.encoders.transformer import Encoded
from vl_jax.encoders.vit import ViTConfig
from vl_jax.fusion.budget import LEARNING, BudgetConfig, GateOutput, budget_loss
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.fusion.towers import Seen, before_answers, looking, only_infers, read_open_rows
from vl_jax.language.decoder import Decoder, DecoderConfig, LayerContext
from vl_jax.moe.config import BalanceConfig, GateConfig
from vl_jax.moe.layer import MoEOutput
from vl_jax.moe.routing import MoEConfig, RoutingContext, State, is_causal
from vl_jax.moe.specialise.replay import guided
from vl_jax.moe.stacks import RoutingState, Stack, by_name, check_packed, state_of
from vl_jax.nn import cache as cache_lib
from vl_jax.nn.cache import Cache
from vl_jax.nn.masks import PackedMask, cross_mask
from vl_jax.params import Leaf

# The parts that may have sparse layers: names of their parameters and stacks.
LANGUAGE, ENCODER = "language", "encoder"


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """How visual tokens meet text."""

    kind: Literal["prefix", "gated"] = "prefix"
    gate: CrossModalGateConfig = CrossModalGateConfig()  # used by ``gated``


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """The whole model. Defaults are DeepSeek-VL2 (base)."""

    encoder: AnyEncoder | None = ViTConfig()  # of images; None: a language model
    high_resolution: HighResolutionConfig | None = None  # a second tower, for ``Batch.high_tiles``
    adapter: AdapterConfig = AdapterConfig()
    fusion: FusionConfig = FusionConfig()
    language: DecoderConfig = DecoderConfig()
    moe: MoEConfig = MoEConfig(
        scheme="loss_free",
        num_experts=72,
        expert_dim=1536,
        gates=GateConfig(normalize=True, scale=2.0),
        balance=BalanceConfig(weight=1e-4),
    )
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32

    def __post_init__(self):
        self.language.check_experts(self.moe)
        if self.language.passable and self.budget is not None:
            raise ValueError("language.depths and fusion.gate.budget exclude each other")
        if self.encoder is None:
            if self.high_resolution is not None:
                raise ValueError("high_resolution needs an encoder, whose tokens its own are joined with")
            return
        _ = self.leaves_out_tower  # it says what cannot be
        if len(self.encoder.input_shape) != 3:
            raise ValueError(
                f"encoder={type(self.encoder).__name__} takes inputs of shape {self.encoder.input_shape}; "
                "expected images, (height, width, channels)"
            )
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
        return self.encoder.num_tokens - self.adapter.skip

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
    def stacks(self) -> dict[str, Stack]:
        """The sparse layers of the decoder and of the encoder, as far as they have any."""
        own = None if self.encoder is None else self.encoder.stack
        result = self.language.stacks_of(self.moe, LANGUAGE)
        if own is not None:
            result[ENCODER] = dataclasses.replace(own, runs=tuple((ENCODER, *run) for run in own.runs))
        return result

    def spec(self) -> ModelSpec:
        """What the data side must know.

        Raises:
          ValueError: see ``tile_tokens_side``.
        """
        return ModelSpec(
            tile_tokens_side=self.tile_tokens_side,
            fusion=self.fusion.kind,
            vocab_size=self.language.vocab_size,
        )

    def check_data(self, data: DataConfig) -> None:
        """Refuses tiles of another size than the encoder's images, and packing where samples would mix.

        Raises:
          ValueError: names both sides.
        """
        side = data.tiling.tile_size
        if self.encoder is not None and self.encoder.input_shape[:2] != (side, side):
            shape = " x ".join(map(str, self.encoder.input_shape[:2]))
            raise ValueError(
                f"data.tiling.tile_size={side} differs from the images of model.encoder, {shape}"
            )
        if data.packing is not None:
            for stack in self.language.stacks_of(self.moe, LANGUAGE).values():
                check_packed(stack.moe, "model.moe")
        if self.budget is not None:
            talk = data.conversation
            branches = talk.turns == "independent" and talk.max_turns != 1
            packing, where = data.packing is not None, "model.fusion.gate.budget"
            self.budget.refuse_shared_rows(packing=packing, branches=branches, where=where)

    @property
    def budget(self) -> BudgetConfig | None:
        """Of the gate between pictures and text, if it has one."""
        return self.fusion.gate.budget if self.fusion.kind == "gated" else None

    @property
    def leaves_out_tower(self) -> bool:
        """Whether, at inference, the tower does not run for samples that look in no layer.

        Raises:
          ValueError: the budget says that it is left out, and it cannot be.
        """
        if self.budget is None or self.encoder is None:
            return False
        experts = "the encoder has experts, and what they say of a batch is of all rows"
        return self.budget.leaves_out_tower(against="" if self.encoder.stack is None else experts)

    @property
    def may_lack(self) -> frozenset[str]:
        """Inputs that a whole batch may lack: it then has a program of its own, without their parts."""
        return frozenset() if self.encoder is None else frozenset({TILES})

    def build(self) -> VisionLanguage:
        """The module."""
        return VisionLanguage(self)

    def smallest_batch(self, rows: int) -> Batch:
        """A batch of two tokens a row: enough to learn the shapes of the parameters."""
        pixels = (0, 1, 1, 3) if self.encoder is None else (1, *self.encoder.input_shape)
        high = None
        if self.high_resolution is not None:
            side = self.high_resolution.encoder.image_size
            high = np.zeros((rows, 1, side, side, pixels[-1]), np.float32)
        tiles, height, width, channels = pixels
        sizes = {"T": 2, "Q": 2, "S": 2, "M": tiles, "h": height, "w": width, "c": channels}
        batch = blank(sizes, rows)
        return batch.replace(segment_ids=batch.segment_ids + 1, high_tiles=high)  # pyright: ignore

    @property
    def decoding_moe(self) -> MoEConfig | None:
        """The experts of the part that writes, such as look ahead if any do; None if it has none."""
        groups = self.language.groups_of(self.moe).values()
        return min((group.moe for group in groups), key=is_causal, default=None)

    def opening(self, batch: Batch) -> Batch:
        """What the decoder reads of prompts before it writes: all of them."""
        return batch

    def init_cache(self, *, batch: int, slots: int) -> Cache:
        """An empty cache for ``slots`` tokens a row."""
        runs = self.language.runs_with(self.moe)
        return cache_lib.create(
            runs=[len(run.layers) for run in runs],
            passable=[number for number, run in enumerate(runs) if run.depths],
            batch=batch,
            slots=slots,
            kept=self.language.attention.kept,
            dtype=jnp.dtype(self.dtype),
        )


@struct.dataclass
class ModelOutput:
    """Hidden states and what the sparse layers returned."""

    hidden: Leaf  # [B T D] after the final norm
    routed: dict[str, MoEOutput]  # by stack, over its layers
    cache: Cache | None
    gates: GateOutput | None = None  # of gates with a budget, where there was something to look at


class VisionLanguage(nn.Module):
    """The model; ``__call__`` is the training and prefill pass, ``decode`` one step over the cache."""

    config: VisionLanguageConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if c.encoder is not None:
            encoder: Any = c.encoder.build(dtype, remat=c.language.remat != "none")
            self.encoder = encoder
            self.adapter = Adapter(c.adapter, c.language.embed_dim)
        if c.high_resolution is not None:
            self.high = HighResolution(c.high_resolution, dtype, remat=c.language.remat != "none")
            self.aligner = ResolutionAligner(c.language.embed_dim)
        gate = c.fusion.gate if c.fusion.kind == "gated" else None
        self.language = Decoder(c.language, c.moe, gate, dtype)

    def see(
        self, batch: Batch, routing_state: RoutingState | None = None
    ) -> tuple[Float[Array, "B S D"] | Seen, MoEOutput | None]:
        """The visual tokens of every row, in reading order, zeros where a row has none.

        With them comes what the sparse layers of the encoder returned, if it has any. Where a budget is over
        rows, so does how far each is to look, which the words before its first answer decide.
        """
        return self._see(batch, routing_state)[:2]

    def _see(
        self, batch: Batch, routing_state: RoutingState | None
    ) -> tuple[Float[Array, "B S D"] | Seen, MoEOutput | None, Leaf]:
        """``see``, and the number of rows whose pictures were read."""
        c, rows = self.config, batch.tokens.shape[0]
        if c.encoder is None or not batch.visual_index.shape[1]:
            shape = (*batch.visual_index.shape, c.language.embed_dim)
            return jnp.zeros(shape, c.dtype), None, jnp.float32(0)
        pictures, looks, budget = (batch.tiles, batch.high_tiles, batch.visual_index), None, c.budget
        if budget is not None and budget.grain != "token":
            looks = self.language.looks(batch.tokens, before_answers(batch))
        if looks is None or budget is None or not c.leaves_out_tower or not only_infers(self):
            vision, routed = self.read(pictures, (routing_state or {}).get(ENCODER))
            return vision if looks is None else Seen(vision, looks), routed, jnp.float32(rows)
        parts = (ENCODER, "adapter", "high", "aligner")
        (vision, _), ran = read_open_rows(
            self, "read", looking(looks, batch), pictures, parts=parts, buckets=budget.buckets
        )
        return Seen(vision, looks), None, ran

    def read(
        self, pictures: tuple[Leaf, Leaf, Leaf], routing_state: State | None = None
    ) -> tuple[Float[Array, "B S D"], MoEOutput | None]:
        """The visual tokens of some rows, and what the sparse layers of the encoder returned.

        Args:
          pictures: ``tiles``, ``high_tiles`` and ``visual_index`` of a ``Batch``.
        """
        *both, index = pictures
        rows, tiles = both[0].shape[:2]
        index = jnp.asarray(index)
        used = used_tiles(index, tiles=tiles, tile_tokens=self.config.tile_tokens)
        flat, high = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), both)
        encoded = self.encode(flat, high, used.reshape(-1), routing_state)
        patches = encoded.tokens.reshape(rows, tiles, *encoded.tokens.shape[1:])
        return self.adapter(patches, index), encoded.routed

    def encode(
        self,
        tiles: Leaf,
        high_tiles: Leaf = None,
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Every tile [M h w c]; tokens are joined with those of the second tower if there is one.

        Args:
          valid: tiles that are used; None: all of them.
          routing_state: of the sparse layers of the encoder.

        Raises:
          ValueError: there is a second tower, and no normalised pixels for it.
        """
        if self.config.high_resolution is None:
            return self.encoder(tiles, valid, routing_state)
        if high_tiles is None or not jnp.issubdtype(high_tiles.dtype, jnp.floating):
            found = None if high_tiles is None else high_tiles.dtype
            raise ValueError(f"high_tiles={found}: the high-resolution tower needs normalised floats")
        low = self.encoder(tiles, valid, routing_state)
        return dataclasses.replace(low, tokens=self.aligner(low.tokens, self.high(high_tiles).tokens))

    def __call__(
        self,
        batch: Batch,
        routing_state: RoutingState,
        *,
        seen: Float[Array, "B S D"] | Seen | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Hidden states for every position of the batch.

        Args:
          routing_state: as ``stacks.init_state`` makes it.
          seen: the visual tokens, if ``see`` already ran; the encoder's statistics are then left out.
          cache: if given, the batch is appended to it (a row's segment must not begin before).
        """
        in_encoder, read, routing_state = None, jnp.float32(0), guided(routing_state, batch)
        if seen is None:
            seen, in_encoder, read = self._see(batch, routing_state)
        vision, looks = (seen.vision, seen.looks) if isinstance(seen, Seen) else (seen, None)
        x = self.embed(batch, vision)
        gated = self.config.fusion.kind == "gated" and vision.shape[1] > 0
        if cache is None:
            mask, offset = PackedMask(batch.segment_ids, batch.branch_ids), 0
        else:
            mask, offset = cache_lib.causal_mask(cache, batch.segment_ids), cache.length
        seeing = batch.segment_ids, batch.visual_start, batch.visual_segment_ids
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
            vision_mask=cross_mask(*seeing, offset=offset) if gated else None,
            length=None if cache is None else cache.length,
            learning=self.has_rng(LEARNING),
        )
        own = state_of(routing_state, LANGUAGE, self.config.stacks)
        hidden, routed, kept, decided = self.language(x, context, own, cache, looks)
        if cache is not None:
            cache = cache_lib.append(cache, kept, batch.segment_ids)
        gates = None
        if decided is not None:
            assert self.config.budget is not None
            gates = GateOutput(decided, budget_loss(decided, self.config.budget), read)
        by_stack = by_name(routed, LANGUAGE) | by_name(in_encoder, ENCODER)
        return ModelOutput(hidden, by_stack, cache, gates)

    def embed(self, batch: Batch, vision: Float[Array, "B S D"]) -> Float[Array, "B T D"]:
        """What enters the decoder: embeddings of text, with ``prefix`` fusion visual tokens among them."""
        x = self.language.embed(batch.tokens)
        if self.config.fusion.kind == "gated" or self.config.encoder is None or not vision.shape[1]:
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

    def initialize(self, batch: Batch, routing_state: RoutingState) -> Float[Array, "B T V"]:
        """Touches every parameter once; the method to call ``init`` with."""
        return self.logits(self(batch, routing_state).hidden)
