"""Streams: what the towers of a joint model saw, as fusion and heads find it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.fusion.budget import GateOutput
from vl_jax.fusion.weights import ModalityWeights
from vl_jax.params import Leaf


@struct.dataclass
class Stream:
    """The tokens of one tower, or what a fusion made of them."""

    tokens: Leaf  # [B S D]
    mask: Leaf  # bool[B S] tokens that are there
    pooled: Leaf = None  # [B E] the tower's own vector, if it has one
    maps: tuple[Leaf, ...] = ()  # [B h w D] each, finest first: of a tower that sees one picture a row
    gates: GateOutput | None = None  # what a gate with a budget decided, where one made this stream
    weights: ModalityWeights | None = None  # how much each modality counts in it, where a fusion says so
    content: Leaf = None  # u32[B] a number of the row that random draws follow, where a fusion draws


Streams = Mapping[str, Stream]  # by the name of the tower or fusion


def pool(stream: Stream) -> Float[Array, "B E"]:
    """The stream as one vector a row: its own, or the mean of the tokens that are there."""
    if stream.pooled is not None:
        return stream.pooled
    mask = stream.mask[..., None].astype(jnp.float32)
    total = jnp.sum(stream.tokens.astype(jnp.float32) * mask, axis=1)
    return (total / jnp.maximum(jnp.sum(mask, axis=1), 1.0)).astype(stream.tokens.dtype)


def here(stream: Stream) -> Bool[Array, " B"]:
    """The rows that have anything in a stream."""
    return jnp.any(stream.mask, axis=1)


def filled(streams: Streams) -> dict[str, Stream]:
    """The streams that have room for tokens: what the others are of, no row of the batch has."""
    return {name: stream for name, stream in streams.items() if stream.tokens.shape[1]}


def add_vector(streams: Streams, name: str, vector: Float[Array, "B D"], **said: Any) -> Streams:
    """The streams and a further one, of one token a row, which is its vector too.

    It is there for the rows that have anything in another.
    """
    mask = jnp.zeros(vector.shape[0], bool)
    for stream in streams.values():
        mask = mask | here(stream)
    vector = jnp.where(mask[:, None], vector, 0)
    return {**streams, name: Stream(vector[:, None], mask[:, None], vector, **said)}
