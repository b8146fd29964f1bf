"""Prefill of left-padded prompts, in chunks if wanted, then one token at a time over the cache."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.batch import FIELDS, Batch
from vl_jax.generation.choice import GenerationConfig, choose
from vl_jax.model import VisionLanguage, init_cache
from vl_jax.moe import routing
from vl_jax.moe.stacks import RoutingState
from vl_jax.nn.cache import Cache
from vl_jax.params import Leaf

logger = logging.getLogger(__name__)


@struct.dataclass
class Course:
    """How far a generation has come, but for its cache."""

    index: Leaf  # i32[] tokens generated
    key: Leaf | None  # randomness of what follows
    logits: Leaf  # f32[B V] of the next token
    used: Leaf | None  # bool[B V] tokens that the repetition penalty is for


def prefill(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    *,
    model: VisionLanguage,
    slots: int,
    chunk: int | None,
) -> tuple[Float[Array, "B V"], Cache, Float[Array, "B S D"]]:
    """Reads the prompts: logits of what follows them, the filled cache, and the visual tokens.

    Args:
      slots: tokens a row of the cache has room for.
      chunk: tokens read at a time, which bounds the memory of long prompts; None: all at once.
    """
    variables = _variables(params)
    rows, length = batch.tokens.shape
    vision, _ = cast(Any, model.apply(variables, batch, routing_state, method="see"))
    if chunk is None or chunk >= length:
        cache = init_cache(model.config, batch=rows, slots=slots)
        output: Any = model.apply(variables, batch, routing_state, vision=vision, cache=cache)
        return _next_logits(model, variables, output.hidden), output.cache, vision
    padding = -length % chunk
    cache = init_cache(model.config, batch=rows, slots=slots + padding)
    cache = dataclasses.replace(cache, empty=False)  # one program reads all chunks
    padded = pad_prompts(batch, length + padding)
    chunks = {name: jnp.moveaxis(getattr(padded, name).reshape(rows, -1, chunk), 1, 0) for name in _BY_TOKEN}

    def read(cache: Cache, part: dict[str, jax.Array]) -> tuple[Cache, jax.Array]:
        part_batch = dataclasses.replace(padded, **part)
        output: Any = model.apply(variables, part_batch, routing_state, vision=vision, cache=cache)
        return output.cache, output.hidden[:, -1:]

    cache, hidden = jax.lax.scan(read, cache, chunks)
    return _next_logits(model, variables, hidden[-1]), cache, vision


def decode(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    vision: Float[Array, "B S D"],
    token: Int[Array, " B"],
    index: Int[Array, ""] | int,
    cache: Cache,
    *,
    model: VisionLanguage,
) -> tuple[Float[Array, "B V"], Cache]:
    """Appends one token to every row; gives the logits of the next.

    Args:
      batch: the prompts.
      index: how many tokens were generated before this one.
    """
    one = jnp.ones_like(token)[:, None]
    new = dataclasses.replace(
        batch,
        tokens=token[:, None],
        positions=batch.positions[:, -1:] + 1 + index,
        segment_ids=one,
        branch_ids=0 * one,
        visual_slot=-one,
    )
    variables = _variables(params)
    output: Any = model.apply(variables, new, routing_state, vision=vision, cache=cache)
    return _next_logits(model, variables, output.hidden), output.cache


def advance(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    vision: Float[Array, "B S D"],
    course: Course,
    cache: Cache,
    *,
    model: VisionLanguage,
    config: GenerationConfig,
) -> tuple[Int[Array, " B"], Course, Cache]:
    """Chooses the next token of every row and appends it."""
    key, now = (None, None) if course.key is None else jax.random.split(course.key)
    token, used = choose(course.logits, now, course.used, config=config), course.used
    if used is not None:
        used = used.at[jnp.arange(token.shape[0]), token].set(True)
    logits, cache = decode(params, routing_state, batch, vision, token, course.index, cache, model=model)
    return token, Course(course.index + 1, key, logits, used), cache


_BY_TOKEN = {name: field for name, field in FIELDS.items() if field.axes == ("T",)}


def pad_prompts(batch: Batch, length: int) -> Batch:
    """The prompts with more padding before them, ``length`` tokens in all."""
    more = length - batch.tokens.shape[1]
    padded = {
        name: jnp.pad(getattr(batch, name), ((0, 0), (more, 0)), constant_values=field.padding)
        for name, field in _BY_TOKEN.items()
    }
    return dataclasses.replace(batch, **padded, visual_start=batch.visual_start + more)


def warn_if_not_causal(model: VisionLanguage) -> None:
    """Says so when routing looks ahead, since decoding cannot."""
    moe = model.config.moe
    if model.config.stacks and not routing.is_causal(moe):
        logger.warning(
            "routing (scheme %r, priority %r) looks at all tokens of a row at once; decoding token by token, "
            "it sees only the newest token, so answers may be worse than the training loss suggests",
            moe.scheme,
            moe.limit.priority,
        )


def _variables(params: Any) -> dict[str, Any]:
    """What the model is applied with: bare parameters, or these and collections, each by its name."""
    return params if "params" in params else {"params": params}


def _next_logits(model: VisionLanguage, variables: Any, hidden: jax.Array) -> jax.Array:
    logits: Any = model.apply(variables, hidden[:, -1:], method="logits")
    return logits[:, 0]


def empty_rows(batch: Batch) -> jax.Array:
    """Rows that hold no prompt at all (they fill up a batch); they are finished from the start."""
    return jnp.max(batch.segment_ids, axis=1) == 0


def is_any(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """Which of the tokens end a row."""
    return jnp.any(tokens[..., None] == jnp.array(stop, jnp.int32), axis=-1)
