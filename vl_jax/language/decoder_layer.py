"""One layer of the decoder, dense or sparse; and one that tokens may pass by."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.fusion.budget import Decided
from vl_jax.fusion.gate import CrossModalGate, CrossModalGateConfig, SkippingGate
from vl_jax.language.decoder_config import DecoderConfig
from vl_jax.language.depths import (
    BlockRouter,
    TakenPlaces,
    fits,
    mask_of,
    places_of,
    put_back,
    room_for,
    routing_of,
    taken_of,
)
from vl_jax.language.gqa import GQA
from vl_jax.language.mla import MLA, MLAConfig
from vl_jax.moe.layer import Carried, DynamicMoE, MoEOutput, carried_apart, carry, handed_on, of_layer
from vl_jax.moe.routing import MoEConfig, RoutingContext, State
from vl_jax.nn.layers import GatedMLP, RMSNorm
from vl_jax.nn.masks import within_window
from vl_jax.params import Leaf
from vl_jax.sharding import constrain


@struct.dataclass
class LayerContext:
    """What every layer reads and none changes."""

    positions: Leaf  # i32[B T]
    mask: Leaf  # a ``PackedMask``, or bool[B T T]; with slots of a cache bool[B T S+T]
    routing: RoutingContext
    vision: Leaf | None  # [B S D] visual tokens, for the gate; None: there are none, and no gate runs
    vision_mask: Leaf | None  # bool[B T S]
    length: Leaf | None  # i32[] filled slots of the cache; None: there is none to keep anything in
    learning: bool = struct.field(pytree_node=False, default=False)  # gates with a budget are to learn


@struct.dataclass
class LayerState:
    """What belongs to one layer and is not a parameter; stacked over layers outside the scan."""

    routing: State  # state of the routing scheme; empty for a dense layer
    cached: Leaf | None  # what the cache keeps for this layer, unless it is empty
    window: Leaf | None  # i32[] tokens the layer looks back on, 0: all
    number: Leaf  # i32[] of the layer among all
    looks: Leaf | None = None  # f32[B] logits of the rows that are to look; None: nobody decides for a row
    depth: State | None = None  # state of the router of a layer that tokens may pass by


# Besides x: what attention keeps of the tokens, what experts, gate and router of the layer returned.
Found = tuple[Leaf | None, MoEOutput | None, Decided | None, MoEOutput | None]


class DecoderLayer(nn.Module):
    """One decoder layer; ``moe`` None makes it dense."""

    config: DecoderConfig
    moe: MoEConfig | None
    gate: CrossModalGateConfig | None

    @nn.compact
    def __call__(self, carried: Carried, state: LayerState, context: LayerContext) -> tuple[Carried, Found]:
        """Takes and returns x [B T D], with the router logits that are handed on if anyone asks for them."""
        return self._block(carried, state, context)

    def _block(self, carried: Carried, state: LayerState, context: LayerContext) -> tuple[Carried, Found]:
        (x, previous), c = carried_apart(carried), self.config
        x, decided = self._look(x, state, context)
        mask, length = context.mask, context.length
        if state.window is not None:
            mask = within_window(mask, state.window, offset=0 if length is None else length)
        attention = MLA if isinstance(c.attention, MLAConfig) else GQA
        mixed, kept = attention(c.attention, name="attention")(  # pyright: ignore[reportArgumentType]
            RMSNorm(c.norm_epsilon, name="attention_norm")(x),
            positions=context.positions,
            mask=mask,
            cached=state.cached,
        )
        x = constrain(x + mixed, "batch", None, None)
        normed = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        routed = None
        if self.moe is None:
            y = GatedMLP(c.mlp_dim, c.activation, c.mlp_bias, name="mlp")(normed)
        else:
            where = of_layer(context.routing, previous, state.number, c.num_layers)
            y, routed = DynamicMoE(self.moe, name="moe")(normed, where, state.routing)
            previous, routed = handed_on(routed)
        x = constrain(x + y, "batch", None, None)
        return carry(x, previous), (None if length is None else kept, routed, decided, None)

    def _look(
        self, x: jax.Array, state: LayerState, context: LayerContext
    ) -> tuple[jax.Array, Decided | None]:
        """What vision says is added, and what a gate with a budget decided comes with it."""
        if self.gate is None or context.vision is None:
            return x, None
        assert context.vision_mask is not None
        if self.gate.budget is None:
            return x + CrossModalGate(self.gate, name="gate")(x, context.vision, context.vision_mask), None
        found, decided = SkippingGate(self.gate, name="gate")(
            x, context.vision, context.vision_mask, state.looks, learning=context.learning
        )
        return x + found, decided


class PassableLayer(DecoderLayer):
    """A decoder layer that tokens may pass by; its parameters are those of the layer, and a router's."""

    @nn.compact
    def __call__(self, carried: Carried, state: LayerState, context: LayerContext) -> tuple[Carried, Found]:
        """Takes and returns x [B T D], with the router logits that are handed on if anyone asks for them."""
        (x, _), c = carried_apart(carried), self.config
        assert c.depths is not None
        where = of_layer(context.routing, None, state.number, c.num_layers)
        taken = BlockRouter(c.depths.router, name="depth")(x, where, state.depth or {})
        length, room = x.shape[1], room_for(x.shape[1], c.depths)
        operands = (carried, state, context, taken.gate, taken.chosen)

        def some(layer: PassableLayer, *operands: Any) -> tuple[Carried, Found]:
            return layer._among(places_of(operands[-1], room), *operands)

        def every(layer: PassableLayer, *operands: Any) -> tuple[Carried, Found]:
            return layer._among(None, *operands)

        if room == length or self.is_mutable_collection("intermediates"):
            carried, found = every(self, *operands)
        elif self.has_rng("routing") or self.is_initializing():
            carried, found = some(self, *operands)
        else:
            carried, found = nn.cond(fits(taken.chosen, room), some, every, self, *operands)
        return carried, (*found[:3], taken.output)

    def _among(
        self,
        places: TakenPlaces | None,
        carried: Carried,
        state: LayerState,
        context: LayerContext,
        gate: Float[Array, "B T"],
        chosen: Bool[Array, "B T"],
    ) -> tuple[Carried, Found]:
        """The block for the chosen tokens, in places of their own or, None, where they stand."""
        (x, previous), cached = carried_apart(carried), state.cached
        inner = context.replace(  # pyright: ignore[reportAttributeAccessIssue]
            positions=taken_of(context.positions, places),
            mask=mask_of(context.mask, chosen, None if cached is None else cached[-1], places),
            routing=routing_of(context.routing, chosen, places),
            vision_mask=None if context.vision_mask is None else taken_of(context.vision_mask, places),
        )
        own = state.replace(cached=None if cached is None else cached[:-1])  # pyright: ignore[reportAttributeAccessIssue]
        before = taken_of(x, places), None if previous is None else taken_of(previous, places)
        carried, (kept, routed, decided, _) = self._block(carry(*before), own, inner)
        after, logits = carried_apart(carried)
        added = put_back(after - before[0], chosen, places).astype(jnp.float32)
        x = x + (gate[..., None] * added).astype(x.dtype)
        if previous is not None and logits is not None:
            previous = jnp.where(chosen[..., None], put_back(logits, chosen, places), previous)
        if kept is not None:
            kept = tuple(put_back(part, chosen, places) for part in kept)
            kept = (*kept, chosen.astype(kept[0].dtype))
        return carry(constrain(x, "batch", None, None), previous), (kept, routed, decided, None)
