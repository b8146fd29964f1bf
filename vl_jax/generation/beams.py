"""Beam search: the best of several continuations of every row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vl_jax.batch import Batch
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import Writer, decode, empty_rows, is_any, prefill
from vl_jax.moe.stacks import RoutingState
from vl_jax.nn.cache import Cache


def beam_search(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    *,
    model: Writer,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Int[Array, "B new"]:
    """The best of ``num_beams`` continuations by log-probability per length ** penalty.

    Every row keeps K running continuations and the K best that have ended. Of the 2 K best extensions at most
    K end (with one stop id), so K go on.
    """
    (rows, length) = model.config.opening(batch).tokens.shape
    beams, new = config.num_beams, config.max_new_tokens
    logits, cache, seen = prefill(
        params, routing_state, batch, model=model, slots=length + new, chunk=config.prefill_chunk
    )
    repeat = functools.partial(jnp.repeat, repeats=beams, axis=0)
    wide, seen, logits = jax.tree.map(repeat, (batch, seen, logits))
    cache = _gather_rows(cache, jnp.repeat(jnp.arange(rows), beams))
    low = jnp.finfo(jnp.float32).min
    # At first all beams of a row are the same: only one of them may be extended.
    running = jnp.where(jnp.arange(beams) == 0, 0.0, low) * jnp.ones((rows, 1))
    blank = jnp.full((rows, beams, new), stop[0], jnp.int32)
    candidates = beams * (1 + len(stop))

    def step(carry: tuple) -> tuple:
        index, running, tokens, ended, ended_tokens, logits, cache = carry
        scores = running[..., None] + jax.nn.log_softmax(logits.reshape(rows, beams, -1), axis=-1)
        best, flat = jax.lax.top_k(scores.reshape(rows, -1), candidates)
        parent, token = flat // logits.shape[-1], (flat % logits.shape[-1]).astype(jnp.int32)
        extended = jnp.take_along_axis(tokens, parent[..., None], axis=1).at[:, :, index].set(token)
        ends = is_any(token, stop)
        reward = best / (index + 1).astype(jnp.float32) ** config.length_penalty
        pool = jnp.concatenate([ended, jnp.where(ends, reward, low)], axis=1)
        ended, kept = jax.lax.top_k(pool, beams)
        ended_tokens = jnp.take_along_axis(
            jnp.concatenate([ended_tokens, extended], axis=1), kept[..., None], axis=1
        )
        running, on = jax.lax.top_k(jnp.where(ends, low, best), beams)
        tokens = jnp.take_along_axis(extended, on[..., None], axis=1)
        parent, token = jnp.take_along_axis(parent, on, axis=1), jnp.take_along_axis(token, on, axis=1)
        cache = _gather_rows(cache, (jnp.arange(rows)[:, None] * beams + parent).reshape(-1))
        logits, cache = decode(
            params, routing_state, wide, seen, token.reshape(-1), index, cache, model=model
        )
        return index + 1, running, tokens, ended, ended_tokens, logits, cache

    def unfinished(carry: tuple) -> jax.Array:
        index, running, _, ended, *_ = carry
        # The best a running continuation can still reach, if every further token were certain.
        longest = jnp.where(config.length_penalty > 0, new, index + 1).astype(jnp.float32)
        hope = jnp.max(running, axis=1) / longest**config.length_penalty
        return (index < new) & jnp.any((hope > jnp.min(ended, axis=1)) & ~empty_rows(batch))

    start = (jnp.zeros((), jnp.int32), running, blank, jnp.full((rows, beams), low), blank, logits, cache)
    _, running, tokens, ended, ended_tokens, _, _ = jax.lax.while_loop(unfinished, step, start)
    # Whoever ran out of room competes as if it had ended.
    every = jnp.concatenate([ended, running / float(new) ** config.length_penalty], axis=1)
    winner = jnp.argmax(every, axis=1)[:, None, None]
    result = jnp.take_along_axis(jnp.concatenate([ended_tokens, tokens], axis=1), winner, axis=1)[:, 0]
    return jnp.where(empty_rows(batch)[:, None], stop[0], result)


def _gather_rows(cache: Cache, rows: jax.Array) -> Cache:
    return dataclasses.replace(
        cache, runs=jax.tree.map(lambda a: a[:, rows], cache.runs), segment_ids=cache.segment_ids[rows]
    )
