"""Prefill of left-padded prompts, in chunks if wanted, then one token at a time over the cache."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.batch import FIELDS, Batch
from vl_jax.generation.choice import GenerationConfig, choose
from vl_jax.moe import routing
from vl_jax.moe.stacks import RoutingState
from vl_jax.nn.cache import Cache
from vl_jax.params import Leaf

logger = logging.getLogger(__name__)


@runtime_checkable
class Writer(Protocol):
    """A module that writes text.

    Its config has what a ``ModelConfig`` has, and besides::

        decoding_moe                     experts of the part that writes, or None
        opening(batch)                   what that part reads of prompts before it writes
        init_cache(batch=rows, slots=n)  an empty ``Cache``

    Its ``__call__`` takes ``seen`` and ``cache`` too, and returns ``hidden`` and the extended ``cache``.
    """

    config: Any
    apply: Any  # as every flax module has it

    def see(self, batch: Batch, routing_state: Any = None) -> tuple[Any, Any]:
        """What is made of the prompts once, an array or a tree with rows first; and what experts returned."""
        ...

    def logits(self, hidden: Any) -> Any:
        """Vocabulary scores."""
        ...


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
    model: Writer,
    slots: int,
    chunk: int | None,
) -> tuple[Float[Array, "B V"], Cache, Any]:
    """Reads the prompts: logits of what follows them, the filled cache, and what is looked at besides.

    Args:
      slots: tokens a row of the cache has room for.
      chunk: tokens read at a time, which bounds the memory of long prompts; None: all at once.
    """
    variables = _variables(params)
    seen, _ = cast(Any, model.apply(variables, batch, routing_state, method="see"))
    read = model.config.opening(batch)
    rows, length = read.tokens.shape
    if chunk is None or chunk >= length:
        cache = model.config.init_cache(batch=rows, slots=slots)
        output: Any = model.apply(variables, read, routing_state, seen=seen, cache=cache)
        return _next_logits(model, variables, output.hidden), output.cache, seen
    padding = -length % chunk
    cache = model.config.init_cache(batch=rows, slots=slots + padding)
    cache = dataclasses.replace(cache, empty=False)  # one program reads all chunks
    padded = pad_prompts(read, length + padding)
    chunks = {name: jnp.moveaxis(getattr(padded, name).reshape(rows, -1, chunk), 1, 0) for name in _BY_TOKEN}

    def read_chunk(cache: Cache, part: dict[str, jax.Array]) -> tuple[Cache, jax.Array]:
        part_batch = dataclasses.replace(padded, **part)
        output: Any = model.apply(variables, part_batch, routing_state, seen=seen, cache=cache)
        return output.cache, output.hidden[:, -1:]

    cache, hidden = jax.lax.scan(read_chunk, cache, chunks)
    return _next_logits(model, variables, hidden[-1]), cache, seen


def decode(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    seen: Any,
    token: Int[Array, " B"],
    index: Int[Array, ""] | int,
    cache: Cache,
    *,
    model: Writer,
) -> tuple[Float[Array, "B V"], Cache]:
    """Appends one token to every row; gives the logits of the next.

    Args:
      batch: the prompts.
      seen: what ``Writer.see`` made of them.
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
    output: Any = model.apply(variables, new, routing_state, seen=seen, cache=cache)
    return _next_logits(model, variables, output.hidden), output.cache


def advance(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    seen: Any,
    course: Course,
    cache: Cache,
    *,
    model: Writer,
    config: GenerationConfig,
) -> tuple[Int[Array, " B"], Course, Cache]:
    """Chooses the next token of every row and appends it."""
    key, now = (None, None) if course.key is None else jax.random.split(course.key)
    token, used = choose(course.logits, now, course.used, config=config), course.used
    if used is not None:
        used = used.at[jnp.arange(token.shape[0]), token].set(True)
    logits, cache = decode(params, routing_state, batch, seen, token, course.index, cache, model=model)
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


def warn_if_not_causal(model: Writer) -> None:
    """Says so when routing looks ahead, since decoding cannot."""
    moe = model.config.decoding_moe
    if moe is not None and not routing.is_causal(moe):
        logger.warning(
            "routing (scheme %r, priority %r) looks at all tokens of a row at once; decoding token by token, "
            "it sees only the newest token, so answers may be worse than the training loss suggests",
            moe.scheme,
            moe.limit.priority,
        )


def _variables(params: Any) -> dict[str, Any]:
    """What the model is applied with: bare parameters, or these and collections, each by its name."""
    return params if "params" in params else {"params": params}


def _next_logits(model: Writer, variables: Any, hidden: jax.Array) -> jax.Array:
    logits: Any = model.apply(variables, hidden[:, -1:], method="logits")
    return logits[:, 0]


def empty_rows(batch: Batch) -> jax.Array:
    """Rows that hold no prompt at all (they fill up a batch); they are finished from the start."""
    return jnp.max(batch.segment_ids, axis=1) == 0


def is_any(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """Which of the tokens end a row."""
    return jnp.any(tokens[..., None] == jnp.array(stop, jnp.int32), axis=-1)
