"""Mixture of depths: a token takes a block, attention and experts alike, or passes it by (arXiv 2404.02258).

    x [B T D] --router: a gate for every token--> the chosen ones [B n D] --block--> what it adds
                                                        x + gate * what it adds, x where it is passed by

The router is a routing scheme with one expert, the block. In training it takes a fixed share of every sample,
so that the block has room for n tokens and the rest is not computed. In evaluation and generation tokens
decide for themselves; where more want to than there is room for, the block runs on all tokens, and those that
pass it by are masked: the result is the same. Tokens attend only to those that the same block has taken, at
the positions they have in the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.moe import noise, routing
from vl_jax.moe.assignment import RoutingContext, TokenChoice
from vl_jax.moe.config import BalanceConfig, SharedExpertsConfig
from vl_jax.moe.layer import DynamicMoE, MoEOutput, completed, logits_of, statistics
from vl_jax.moe.routing import MoEConfig, State
from vl_jax.nn.masks import PackedMask
from vl_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class DepthsConfig:
    """Which layers tokens may pass by, and who decides it.

    Attributes:
      layers: their numbers, such as every other one.
      router: a routing scheme with one expert, which is the block; of its fields those of experts have no
        meaning. ``--config.model.language.depths.router.options.share=0.25`` sets the share that is taken.
    """

    layers: tuple[int, ...] = ()
    router: MoEConfig = MoEConfig(
        scheme="predicted_choice",
        num_experts=1,
        top_k=1,
        expert_dim=1,
        shared=SharedExpertsConfig(num=0),
        balance=BalanceConfig(weight=0.0, scope="batch"),
    )

    def __post_init__(self):
        if self.router.num_experts != 1 or self.router.shared.num or self.router.simple.num:
            raise ValueError("depths.router must have one expert, the block, and no shared or simple ones")
        if self.router.layers or not self.router.is_dropless:
            raise ValueError("depths.router takes no layers and no limit: its scheme decides alone")

    def check(self, num_layers: int, windows: Sequence[int]) -> None:
        """Refuses layers that are not there, or that have a window.

        Raises:
          ValueError: names them.
        """
        if len(set(self.layers)) != len(self.layers) or not all(0 <= i < num_layers for i in self.layers):
            raise ValueError(
                f"depths.layers={self.layers} must be different numbers from 0 to {num_layers - 1}"
            )
        if any(windows[i] for i in self.layers if windows):
            raise ValueError(
                f"depths.layers={self.layers} with windows={tuple(windows)}: a window counts tokens, and "
                "some would be missing; give these layers the window 0"
            )


@struct.dataclass
class Taken:
    """Who takes the block."""

    gate: Leaf  # f32[B T], 0 for those who pass it by
    chosen: Leaf  # bool[B T]
    output: MoEOutput  # of the router


class BlockRouter(DynamicMoE):
    """Decides which tokens take a block; it has the parameters of a router and no experts."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "B T D"], context: RoutingContext, state: State
    ) -> Taken:
        """Gates and statistics.

        Raises:
          ValueError: the scheme's tokens do not choose.
        """
        c = self.config
        keys = noise.group_keys(self.make_rng("routing"), context) if self.has_rng("routing") else None
        params = self._router(x.shape[-1])
        context = completed(context, x, params, c, keys=keys)
        logits = logits_of(x, params, context, c)
        assignment, losses = routing.route(logits, context, state, c)
        if not isinstance(assignment, TokenChoice):
            raise ValueError(
                f"depths.router.scheme={c.scheme!r} gives {type(assignment).__name__}; tokens must choose "
                "whether to take a block (TokenChoice)"
            )
        self.sow("intermediates", "logits", logits)
        self.sow("intermediates", "scores", routing.probabilities(logits, context, c))
        self.sow("intermediates", "assignment", assignment)
        self.sow("intermediates", "valid", context.valid)
        self.sow("intermediates", "modality", context.modality)
        used = assignment.experts == 0
        gate = jnp.sum(jnp.where(used, assignment.gates, 0.0), axis=-1)
        dropped = jnp.zeros(used.shape, bool)
        stats = statistics(logits, assignment, dropped, context=context, config=c)
        return Taken(gate, jnp.any(used, axis=-1), MoEOutput(jax.lax.stop_gradient(stats), losses))


@struct.dataclass
class TakenPlaces:
    """Where the chosen tokens of every row stand among those that the block sees, in their order."""

    index: Leaf  # i32[B n] of the token in a place; any in one that is empty
    used: Leaf  # bool[B n]
    place: Leaf  # i32[B T] of a chosen token; any for others


def places_of(chosen: Bool[Array, "B T"], room: int) -> TakenPlaces:
    """TakenPlaces for up to ``room`` chosen tokens a row."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :room].astype(jnp.int32)
    used = jnp.arange(room) < jnp.sum(chosen, axis=1, keepdims=True)
    place = jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1
    return TakenPlaces(order, used, jnp.clip(place, 0, room - 1))


def take(array: Array, places: TakenPlaces) -> Array:
    """The chosen tokens' part of an array [B T ...], zeros in empty places."""
    found = jax.vmap(lambda a, i: a[i])(array, places.index)
    return jnp.where(_as_wide(places.used, found), found, jnp.zeros((), found.dtype))


def taken_of(array: Array, places: TakenPlaces | None) -> Array:
    """As ``take``, or the array itself where tokens stay."""
    return array if places is None else take(array, places)


def put_back(array: Array, chosen: Bool[Array, "B T"], places: TakenPlaces | None) -> Array:
    """What the chosen tokens have become, where they stand in the row; zeros for the others."""
    found = array if places is None else jax.vmap(lambda a, i: a[i])(array, places.place)
    return jnp.where(_as_wide(chosen, found), found, jnp.zeros((), found.dtype))


def _as_wide(mask: Bool[Array, "B T"], array: Array) -> Array:
    return mask.reshape(*mask.shape, *(1,) * (array.ndim - 2))


def routing_of(
    context: RoutingContext, chosen: Bool[Array, "B T"], places: TakenPlaces | None
) -> RoutingContext:
    """What the experts of a block may look at: the chosen tokens, in their places if they moved."""
    context = context.replace(valid=context.valid & chosen)  # pyright: ignore[reportAttributeAccessIssue]
    if places is None:
        return context
    names = ("valid", "modality", "tokens", "positions", "previous")
    own = {name: getattr(context, name) for name in names if getattr(context, name) is not None}
    return context.replace(**{name: take(a, places) for name, a in own.items()})  # pyright: ignore[reportAttributeAccessIssue]


def mask_of(
    mask: Bool[Array, "B T K"] | PackedMask,
    chosen: Bool[Array, "B T"],
    before: Float[Array, "B S"] | None,
    places: TakenPlaces | None,
) -> Any:
    """The mask among the chosen tokens, and those of a cache's slots that took the block.

    Args:
      before: 1 for the slots that did, 0 for others; None: there is nothing in the cache.
    """
    if isinstance(mask, PackedMask):
        segments = jnp.where(chosen, mask.segment_ids, 0)
        if places is None:
            return mask.replace(segment_ids=segments)  # pyright: ignore[reportAttributeAccessIssue]
        return PackedMask(take(segments, places), take(mask.branch_ids, places), mask.window)
    length = chosen.shape[1]
    earlier, now = jnp.split(mask, [mask.shape[2] - length], axis=2)
    now = now & chosen[:, None, :]
    if places is not None:
        now = jnp.swapaxes(take(jnp.swapaxes(take(now, places), 1, 2), places), 1, 2)
        earlier = take(earlier, places)
    if before is not None:
        earlier = earlier & (before > 0)[:, None, :]
    return jnp.concatenate([earlier, now], axis=2)


def room_for(length: int, config: DepthsConfig) -> int:
    """TakenPlaces that a block has for the tokens of a row in training."""
    scheme = routing.scheme_of(config.router)
    return max(min(scheme.most(length, config.router), length), 1)


def fits(chosen: Bool[Array, "B T"], room: int) -> Bool[Array, ""]:
    """Whether no row has more chosen tokens than places."""
    return jnp.max(jnp.sum(chosen, axis=1, dtype=jnp.int32)) <= room
