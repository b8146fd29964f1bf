"""Streams: what the towers of a joint model saw, as fusion and heads find it."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from vl_jax.fusion.budget import GateOutput
from vl_jax.params import Leaf


@struct.dataclass
class Stream:
    """The tokens of one tower, or what a fusion made of them."""

    tokens: Leaf  # [B S D]
    mask: Leaf  # bool[B S] tokens that are there
    pooled: Leaf = None  # [B E] the tower's own vector, if it has one
    maps: tuple[Leaf, ...] = ()  # [B h w D] each, finest first: of a tower that sees one picture a row
    gates: GateOutput | None = None  # what a gate with a budget decided, where one made this stream


Streams = Mapping[str, Stream]  # by the name of the tower or fusion


def pool(stream: Stream) -> Float[Array, "B E"]:
    """The stream as one vector a row: its own, or the mean of the tokens that are there."""
    if stream.pooled is not None:
        return stream.pooled
    mask = stream.mask[..., None].astype(jnp.float32)
    total = jnp.sum(stream.tokens.astype(jnp.float32) * mask, axis=1)
    return (total / jnp.maximum(jnp.sum(mask, axis=1), 1.0)).astype(stream.tokens.dtype)
