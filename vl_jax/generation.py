"""Generation: one prefill over left-padded prompts, then greedy decoding over the latent cache."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vl_jax.batch import Batch
from vl_jax.model import VisionLanguage, init_cache
from vl_jax.moe import routing
from vl_jax.moe.routing import State

logger = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop"))
def greedy(
    params: Any, routing_state: State, batch: Batch, *, model: VisionLanguage, max_new_tokens: int, stop: int
) -> Int[Array, "B new"]:
    """The most likely continuation of every row.

    Args:
      batch: prompts, left-padded so that all rows end at the last index.
      stop: id that ends a row; it and everything after it come back as ``stop``.
    """
    variables = {"params": params}
    rows, length = batch.tokens.shape
    cache = init_cache(model.config, batch=rows, slots=length + max_new_tokens)
    vision = model.apply(variables, batch, method="see")
    output: Any = model.apply(variables, batch, routing_state, vision=vision, cache=cache)
    one = jnp.ones((rows, 1), jnp.int32)
    # Rows that hold no prompt at all (they fill up a batch) are finished from the start.
    empty = jnp.max(batch.segment_ids, axis=1) == 0

    def choose(hidden: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, hidden[:, -1:], method="logits")
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

    def step(carry: tuple) -> tuple:
        index, token, done, cache, written = carry
        written = jax.lax.dynamic_update_slice_in_dim(
            written, jnp.where(done, stop, token)[:, None], index, axis=1
        )
        done = done | (token == stop)
        new = dataclasses.replace(
            batch,
            tokens=token[:, None],
            positions=batch.positions[:, -1:] + 1 + index,
            segment_ids=one,
            branch_ids=0 * one,
            visual_slot=-one,
        )
        output: Any = model.apply(variables, new, routing_state, vision=vision, cache=cache)
        return index + 1, choose(output.hidden), done, output.cache, written

    def unfinished(carry: tuple) -> jax.Array:
        index, _, done, _, _ = carry
        return (index < max_new_tokens) & ~jnp.all(done)

    written = jnp.full((rows, max_new_tokens), stop, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), choose(output.hidden), empty, output.cache, written)
    return jax.lax.while_loop(unfinished, step, carry)[-1]


def answer_ids(tokens: Any, *, stop: int) -> list[list[int]]:
    """The generated ids of every row, up to the stop token."""
    return [row[: row.index(stop)] if stop in row else row for row in np.asarray(tokens).tolist()]


def warn_if_not_causal(model: VisionLanguage) -> None:
    """Says so when routing looks ahead, since decoding cannot."""
    moe = model.config.moe
    if not routing.is_causal(moe):
        logger.warning(
            "routing (scheme %r, priority %r) looks at all tokens of a row at once; decoding token by token, "
            "it sees only the newest token, so answers may be worse than the training loss suggests",
            moe.scheme,
            moe.priority,
        )
