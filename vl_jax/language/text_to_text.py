"""Text to text: a question is read by an encoder, and its answer written by a decoder that looks at it.

    row      BOS <|User|>: QUESTION <|Assistant|> :  ANSWER EOS   padding
    encoder  ------------- the source -------------
    decoder                                       ---- written --
    predicts                                      ANSWER EOS

Both stacks have the length of the row, and masks that follow from its own fields. The source of a segment is
what lies before its first target, up to the token that this is predicted from. That token is the first one
the decoder reads; so it reads the targets, shifted right. Where nothing is to be predicted, as in a prompt,
all of the segment is source. In generation the source is encoded once, and so are the keys and values that
the decoder's layers make of it. Several segments in a row see nothing of one another.

Pictures are not seen: where one stands, there is a token that tells nothing of it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax import losses
from vl_jax.batch import FIELDS, Batch, blank
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.kernels.activation import Activation
from vl_jax.language.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, SourceView, same_segment
from vl_jax.moe.config import BalanceConfig, CapacityConfig, SharedExpertsConfig
from vl_jax.moe.layer import MoEOutput
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.specialise.replay import guided
from vl_jax.moe.stacks import RoutingState, Stack, check_packed
from vl_jax.nn import cache as cache_lib
from vl_jax.nn.cache import Cache
from vl_jax.params import Leaf

# The parts that may have sparse layers: names of their parameters, and of their stacks.
ENCODER, DECODER = "encoder", "decoder"


@dataclasses.dataclass(frozen=True)
class TextToTextConfig:
    """Defaults are Switch-Base with 8 experts; but padding takes none of them."""

    network: EncoderDecoderConfig = EncoderDecoderConfig(route_padding=False)
    moe: MoEConfig = MoEConfig(  # of both stacks
        num_experts=8,
        top_k=1,
        expert_dim=3072,
        shared=SharedExpertsConfig(num=0),
        activation=Activation("relu", gated=False),
        balance=BalanceConfig(weight=1e-2),
        limit=CapacityConfig(factor=1.25),
    )
    decoder_moe: MoEConfig | None = None  # of the decoder, where it differs; None: ``moe``
    start_id: int | None = None  # what the decoder reads first; None: the last token of the source
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32

    def __post_init__(self):
        for name, moe in (("moe", self.moe), ("decoder_moe", self.decoder_moe)):
            if moe is not None and moe.layers:
                raise ValueError(f"{name}.layers={moe.layers}: layers of one stack are all alike here")
        size = self.network.vocab_size
        if self.start_id is not None and not 0 <= self.start_id < size:
            raise ValueError(f"start_id={self.start_id}: must be from 0 to {size - 1}, or None")
        if self.network.route_padding:
            raise ValueError(
                "network.route_padding=True: an answer is padding to the encoder and would take experts of "
                "the source; set it to False"
            )

    @property
    def decoding_moe(self) -> MoEConfig | None:
        """The experts of the part that writes; None if it has none."""
        return (self.decoder_moe or self.moe) if self.network.decoder.sparse_layers else None

    @property
    def stacks(self) -> dict[str, Stack]:
        """The sparse layers of the decoder and of the encoder, as far as they have any."""
        parts = {
            DECODER: (self.decoder_moe or self.moe, self.network.decoder),
            ENCODER: (self.moe, self.network.encoder),
        }
        return {
            name: Stack(
                moe,
                of.sparse_layers,
                tuple((name, r.name, "moe") for r in of.runs if r.sparse),
                self.network.activation,
            )
            for name, (moe, of) in parts.items()
            if of.sparse_layers
        }

    def spec(self) -> ModelSpec:
        """What the data side must know: a row predicts answers only, for the rest of it is read."""
        return ModelSpec(
            tile_tokens_side=0,
            fusion="prefix",
            vocab_size=self.network.vocab_size,
            targets=("answers",),
        )

    def check_data(self, data: DataConfig) -> None:
        """Refuses samples with several questions, and packing where samples would act on one another.

        Raises:
          ValueError: names both sides.
        """
        if data.conversation.max_turns != 1:
            raise ValueError(
                f"data.conversation.max_turns={data.conversation.max_turns}: a text-to-text model reads one "
                "question and writes its answer; set it to 1"
            )
        if data.packing is not None:
            for name, stack in self.stacks.items():
                own = name == DECODER and self.decoder_moe is not None
                check_packed(stack.moe, "model.decoder_moe" if own else "model.moe")

    def build(self) -> TextToText:
        """The module."""
        return TextToText(self)

    def smallest_batch(self, rows: int) -> Batch:
        """A batch of two tokens a row: enough to learn the shapes of the parameters."""
        sizes = {"T": 2, "Q": 2, "S": 0, "M": 0, "h": 1, "w": 1, "c": 3}
        batch = blank(sizes, rows)
        return batch.replace(segment_ids=batch.segment_ids + 1)  # pyright: ignore[reportAttributeAccessIssue]

    def opening(self, batch: Batch) -> Batch:
        """What the decoder reads of prompts before it writes: their last token."""
        last = {name: getattr(batch, name)[:, -1:] for name, of in FIELDS.items() if of.axes == ("T",)}
        return dataclasses.replace(batch, **last)

    def init_cache(self, *, batch: int, slots: int) -> Cache:
        """An empty cache for ``slots`` tokens a row."""
        c = self.network
        return cache_lib.create(
            runs=[len(run.layers) for run in c.decoder.runs],
            batch=batch,
            slots=slots,
            kept=((c.num_heads, c.head_dim),) * 2,
            dtype=jnp.dtype(self.dtype),
        )


@struct.dataclass
class Parts:
    """Which tokens of a row are read by what; the first one that a decoder reads is in both."""

    source: Leaf  # bool[B T]
    written: Leaf  # bool[B T]


def parts_of(batch: Batch) -> Parts:
    """The parts of every row: a segment is cut at the first position that something is predicted from.

    Without a target all of a segment is source, and its last token is the first one that is written.
    """
    segments, rows = batch.segment_ids, jnp.arange(batch.tokens.shape[0])[:, None]
    predicting = (
        jnp.zeros_like(segments)
        .at[rows, batch.target_index]
        .max((batch.loss_weights > 0).astype(segments.dtype))
    )
    edges = jnp.pad(segments, ((0, 0), (1, 1)), constant_values=-1)
    begins, ends = segments != edges[:, :-2], segments != edges[:, 2:]
    # Targets of the row up to here, and up to where the segment begins.
    counted = jnp.cumsum(predicting, axis=1)
    earlier = jax.lax.cummax(jnp.where(begins, counted - predicting, 0), axis=1)
    source = counted - predicting == earlier
    written = (counted > earlier) | ends
    return Parts(source & (segments > 0), written & (segments > 0))


@struct.dataclass
class TextToTextOutput:
    """Hidden states of the decoder and what the sparse layers returned."""

    hidden: Leaf  # [B T D] after the final norm; where nothing is written they mean nothing
    routed: dict[str, MoEOutput]  # by stack, over its layers
    cache: Cache | None


class TextToText(nn.Module):
    """The model; its parameters are those of the ``EncoderDecoder``."""

    config: TextToTextConfig

    def setup(self):
        c = self.config
        self.network = EncoderDecoder(c.network, c.moe, c.decoder_moe, jnp.dtype(c.dtype))
        nn.share_scope(self, self.network)

    def see(
        self, batch: Batch, routing_state: RoutingState | None = None
    ) -> tuple[SourceView, dict[str, MoEOutput]]:
        """The prompts, encoded, as the decoder's layers see them; and what the encoder's returned."""
        parts = parts_of(batch)
        encoded, routed = self._encode(batch, parts.source, routing_state or {})
        mask = parts.source[:, None]
        return SourceView(mask, projected=self.network.project(encoded)), routed

    def _encode(
        self, batch: Batch, source: Bool[Array, "B T"], routing_state: RoutingState
    ) -> tuple[Float[Array, "B T D"], dict[str, MoEOutput]]:
        encoded, routed = self.network.encode(
            batch.tokens,
            source,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            routing_state=routing_state.get(ENCODER, {}),
        )
        return encoded, {} if routed is None else {ENCODER: routed}

    def __call__(
        self,
        batch: Batch,
        routing_state: RoutingState,
        *,
        seen: SourceView | None = None,
        cache: Cache | None = None,
    ) -> TextToTextOutput:
        """Hidden states for every position of the batch.

        Args:
          routing_state: as ``stacks.init_state`` makes it.
          seen: the source, if ``see`` already ran: all of the batch is then written, and the encoder's
            statistics are left out.
          cache: if given, the batch is appended to it. Its first token begins an answer.
        """
        batch = jax.tree.map(jnp.asarray, batch)  # a host batch will do
        tokens, segments, by_stack = batch.tokens, batch.segment_ids, {}
        routing_state = guided(routing_state, batch)
        if seen is None:
            parts = parts_of(batch)
            encoded, by_stack = self._encode(batch, parts.source, routing_state)
            mask = parts.source[:, None] & same_segment(segments, segments)
            seen, written, begins = SourceView(mask, encoded), parts.written, parts.source & parts.written
        else:
            written = segments > 0
            before = 0 if cache is None else cache.length
            begins = written & (before + jnp.arange(tokens.shape[1]) == 0)
        if self.config.start_id is not None:
            tokens = jnp.where(begins, self.config.start_id, tokens)
        hidden, routed, cache = self.network.decode(
            tokens,
            seen,
            written,
            segment_ids=segments,
            positions=batch.positions,
            routing_state=routing_state.get(DECODER, {}),
            cache=cache,
        )
        by_stack = by_stack if routed is None else {DECODER: routed, **by_stack}
        return TextToTextOutput(hidden, by_stack, cache)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Vocabulary scores, float32."""
        return self.network.logits(hidden)

    def cross_entropy(
        self, hidden: Float[Array, "B Q D"], targets: Int[Array, "B Q"], weights: Float[Array, "B Q"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The weighted sums of cross-entropy and of hits (see ``losses.head_cross_entropy``)."""
        scaled, kernel = self.network.head_inputs(hidden)
        return losses.head_cross_entropy(scaled, kernel.astype(hidden.dtype), targets, weights)

    def initialize(self, batch: Batch, routing_state: RoutingState) -> Float[Array, "B T V"]:
        """Touches every parameter once; the method to call ``init`` with."""
        return self.logits(self(batch, routing_state).hidden)
