"""What the towers of a joint model read of a batch, and what they give, as streams by rows.

given_to(batch, tower) -> inputs, valid --flat--> the encoder --stream_of--> Stream
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from vl_jax.batch import TILES, TOKENS, Batch, hint_of
from vl_jax.data.media.inputs import MediaInput
from vl_jax.encoders.adapter import used_tiles
from vl_jax.encoders.build import AnyEncoder
from vl_jax.fusion.streams import Stream
from vl_jax.moe.noise import content_of


@dataclasses.dataclass(frozen=True)
class Tower:
    """One encoder, and what it reads."""

    name: str
    encoder: AnyEncoder
    input: str = TILES  # "tiles" (pictures), "tokens" (text), or a name in ``Sample.media``


def media_input(tower: Tower) -> MediaInput:
    """What a tower reads of ``Sample.media``."""
    encoder = tower.encoder
    dtype, varies = getattr(encoder, "input_dtype", "float32"), getattr(encoder, "varies", False)
    return MediaInput(tower.input, encoder.input_shape, dtype, varies)


def has_room(batch: Batch, tower: Tower) -> bool:
    """Whether a row could have what a tower reads: not where the whole batch is known to lack it."""
    if tower.input in (TILES, TOKENS):
        return getattr(batch, tower.input).shape[1] > 0
    return tower.input in batch.media


def given_to(batch: Batch, tower: Tower) -> tuple[jax.Array, Bool[Array, "B ..."]]:
    """What a tower reads, and which of it is there, rows first."""
    if tower.input == TOKENS:
        return batch.tokens, batch.segment_ids > 0
    if tower.input == TILES:
        tiles = batch.tiles.shape[1]
        return batch.tiles, used_tiles(batch.visual_index, tiles=tiles, tile_tokens=tower.encoder.grid**2)
    given = batch.media[tower.input]
    if given.steps is None:
        return given.values, given.present
    there = jnp.arange(given.values.shape[1]) < given.steps[:, None]
    return given.values, there & given.present[:, None]


def flat(given: tuple[jax.Array, jax.Array], tower: Tower) -> tuple[jax.Array, jax.Array]:
    """What a tower is called with: tiles of all rows stand one behind the other."""
    inputs, valid = given
    if tower.input == TILES:
        return inputs.reshape(-1, *inputs.shape[2:]), valid.reshape(-1, *valid.shape[2:])
    return inputs, valid


def token_mask(valid: jax.Array, tokens: jax.Array) -> jax.Array:
    """Which tokens of the inputs of a tower are there, from which inputs are."""
    if valid.shape == tokens.shape[:2]:
        return valid
    return jnp.broadcast_to(valid[:, None], tokens.shape[:2])


def content_of_rows(batch: Batch, towers: Sequence[Tower]) -> UInt32[Array, " B"]:
    """A number of every row, from what it has and not from where it is in the batch."""
    total = jnp.zeros(batch.tokens.shape[:1], jnp.uint32)
    for tower in towers:
        if has_room(batch, tower):
            values, valid = given_to(batch, tower)
            values = jnp.where(valid, values + 1, 0) if tower.input == TOKENS else values
            total = total + content_of(values)
    return total


def told(batch: Batch, head: str) -> tuple[Any, ...]:
    """What the objective tells a head, if it does."""
    hint = batch.media.get(hint_of(head))
    return () if hint is None else (hint.values,)


def nothing_seen(encoder: Any, rows: int, dtype: Any) -> Stream:
    """The stream of a tower that is not run, since no row has anything for it."""
    width = getattr(encoder, "pooled_dim", None)
    pooled = None if width is None else jnp.zeros((rows, width), dtype)
    return Stream(jnp.zeros((rows, 0, encoder.output_dim), dtype), jnp.zeros((rows, 0), bool), pooled)


def stream_of(encoded: Any, valid: jax.Array, rows: int) -> Stream:
    """A tower's output by rows: the tokens of several tiles are joined, their vectors averaged.

    Maps are handed on where a row is one input; those of several tiles are no map of the picture. The vector
    of a row that has nothing for the tower is 0, as where the tower is not run.
    """
    tokens, pooled = encoded.tokens, encoded.pooled
    maps = encoded.maps if tokens.shape[0] == rows else ()
    mask = encoded.mask
    if mask is None:
        mask = token_mask(valid, tokens)
    if tokens.shape[0] != rows:
        tokens, mask = tokens.reshape(rows, -1, tokens.shape[-1]), mask.reshape(rows, -1)
        if pooled is not None:
            weights = valid.reshape(rows, -1, 1).astype(pooled.dtype)
            total = jnp.sum(pooled.reshape(*weights.shape[:2], -1) * weights, axis=1)
            pooled = total / jnp.maximum(jnp.sum(weights, axis=1), 1)
    here = jnp.any(valid.reshape(rows, -1), axis=1)[:, None]
    pooled = None if pooled is None else jnp.where(here, pooled, 0)
    return Stream(tokens, mask & here, pooled, maps)
