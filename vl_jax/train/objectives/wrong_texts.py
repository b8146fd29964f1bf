"""Wrong texts of a batch as rows of their own: no pictures, nothing but a text to read.

    Batch.media["negatives"] [B N 1 + T]  -->  a batch of B * N rows  --model-->  vectors [B N E]

Rows of one picture stay together, so no row changes device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from vl_jax.batch import Batch, Given, blank
from vl_jax.data.text.negatives import NEGATIVES


def present(batch: Batch, head: str) -> Bool[Array, "B N"]:
    """Which wrong texts there are, of rows that have a picture.

    Raises:
      ValueError: the batch has no room for any.
    """
    lengths = _given(batch)[..., 0]
    return (lengths > 0) & batch.labels[head].present[:, None]


def as_rows(batch: Batch) -> Batch:
    """The wrong texts, one a row; a row is empty where there is none."""
    found = _given(batch)
    rows = found.shape[0] * found.shape[1]
    lengths, tokens = found[..., 0].reshape(rows), found[..., 1:].reshape(rows, -1)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    height, width, channels = batch.tiles.shape[2:]
    sizes = {"T": tokens.shape[1], "Q": 0, "S": 0, "M": 0, "h": height, "w": width, "c": channels}

    def absent(given: Given) -> Given:
        shape = (rows, *given.values.shape[1:])
        steps = None if given.steps is None else jnp.zeros(rows, jnp.int32)
        return Given(jnp.zeros(shape, given.values.dtype), jnp.zeros(rows, bool), steps)

    return dataclasses.replace(
        jax.tree.map(jnp.asarray, blank(sizes, rows)),
        tokens=tokens,
        positions=jnp.broadcast_to(places, tokens.shape),
        segment_ids=(places < lengths[:, None]).astype(jnp.int32),
        media={name: absent(given) for name, given in batch.media.items() if name != NEGATIVES},
    )


def _given(batch: Batch) -> jax.Array:
    if NEGATIVES not in batch.media:
        raise ValueError("negatives=True of the objective needs wrong texts: set data.conversation.negatives")
    return batch.media[NEGATIVES].values
