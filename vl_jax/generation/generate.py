"""Continuations of prompts: whole, from one compiled loop, or token by token as they come.

    prompts --prefill--> cache, logits --choose: greedy, sampled, beams--> tokens

``stream`` uses two compiled functions, for the prompt and for a token, that serve all lengths up to the next
multiple of ``SLOT_BUCKET``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vl_jax.batch import Batch, without_blank_pictures
from vl_jax.generation.beams import beam_search
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import Course, Writer, advance, empty_rows, is_any, prefill
from vl_jax.moe.stacks import RoutingState

# Caches of ``stream`` have a multiple of so many slots, so that lengths that differ a little share a program.
SLOT_BUCKET = 256


def generate(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    model: Writer,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Int[Array, "B new"]:
    """A continuation of every row. Where no row has a picture, no part that looks at one is run.

    Args:
      batch: prompts, left-padded so that all rows end at the last index.
      key: randomness; needed when the temperature is not 0.
      stop: ids that end a row; what follows one comes back as ``stop[0]``.
    """
    loop = _loop(model, config, stop)  # pyright: ignore[reportArgumentType] (modules hash by their fields)
    return loop(params, routing_state, without_blank_pictures(batch), key)


def _generate(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    key: jax.Array | None,
    *,
    model: Writer,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Int[Array, "B new"]:
    if config.num_beams > 1:
        return beam_search(params, routing_state, batch, model=model, config=config, stop=stop)
    rows, length = model.config.opening(batch).tokens.shape
    logits, cache, seen = prefill(
        params,
        routing_state,
        batch,
        model=model,
        slots=length + config.max_new_tokens,
        chunk=config.prefill_chunk,
    )
    used = jnp.zeros_like(logits, bool) if config.repetition_penalty != 1 else None

    def step(carry: tuple) -> tuple:
        course, cache, done, written = carry
        token, after, cache = advance(
            params, routing_state, batch, seen, course, cache, model=model, config=config
        )
        token = jnp.where(done, stop[0], token)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], course.index, axis=1)
        return after, cache, done | is_any(token, stop), written

    def unfinished(carry: tuple) -> jax.Array:
        course, _, done, _ = carry
        return (course.index < config.max_new_tokens) & ~jnp.all(done)

    written = jnp.full((rows, config.max_new_tokens), stop[0], jnp.int32)
    course = Course(jnp.zeros((), jnp.int32), key, logits, used)
    return jax.lax.while_loop(unfinished, step, (course, cache, empty_rows(batch), written))[-1]


def stream(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    model: Writer,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Iterator[list[int | None]]:
    """The tokens of ``generate``, as they come: one id per row, None for rows that have ended.

    Raises:
      ValueError: beams cannot be streamed, for the best one is known at the end only.
    """
    if config.num_beams > 1:
        raise ValueError(f"num_beams={config.num_beams}: only num_beams=1 can be streamed")
    batch = without_blank_pictures(batch)
    length = model.config.opening(batch).tokens.shape[1]
    slots = -(-(length + config.max_new_tokens) // SLOT_BUCKET) * SLOT_BUCKET
    logits, cache, seen = _prefill(
        params, routing_state, batch, model=model, slots=slots, chunk=config.prefill_chunk
    )
    done = np.asarray(empty_rows(batch)).tolist()
    choice = dataclasses.replace(config, max_new_tokens=1)  # lengths share a program
    step = _step(model, choice)  # pyright: ignore[reportArgumentType]
    used = jnp.zeros_like(logits, bool) if config.repetition_penalty != 1 else None
    course = Course(jnp.zeros((), jnp.int32), key, logits, used)
    for _ in range(config.max_new_tokens):
        token, course, cache = step(params, routing_state, batch, seen, course, cache)
        ids = np.asarray(token).tolist()
        done = [ended or i in stop for i, ended in zip(ids, done, strict=True)]
        yield [None if ended else i for i, ended in zip(ids, done, strict=True)]
        if all(done):
            return


def answer_ids(tokens: Any, *, stop: Sequence[int]) -> list[list[int]]:
    """The generated ids of every row, up to the first stop token."""
    rows = np.asarray(tokens).tolist()
    return [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in rows]


_prefill = functools.partial(jax.jit, static_argnames=("model", "slots", "chunk"))(prefill)


@functools.cache
def _loop(model: Writer, config: GenerationConfig, stop: tuple[int, ...]) -> Any:
    """``generate``, compiled."""
    return _compiled(functools.partial(_generate, model=model, config=config, stop=stop))


@functools.cache
def _step(model: Writer, config: GenerationConfig) -> Any:
    """``advance``, compiled; to find it by model and config takes as long as a layer: once a stream does."""
    return _compiled(functools.partial(advance, model=model, config=config), donate_argnames=("cache",))


def _compiled(function: Any, **options: Any) -> Any:
    """``jax.jit``; on a CPU XLA looks closer at what has to be copied, and extends a cache where it lies."""
    closer = {"xla_cpu_copy_insertion_use_region_analysis": True}
    return jax.jit(function, compiler_options=closer if jax.default_backend() == "cpu" else None, **options)
