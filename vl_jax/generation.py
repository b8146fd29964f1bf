"""Generation: prefill of left-padded prompts, then one token at a time over the cache.

    prompts --prefill, in chunks if wanted--> cache, logits --choose: greedy, sampled, beams--> tokens

``generate`` is one compiled loop; ``stream`` gives every token as it comes, from two compiled functions, for
the prompt and for a token, that serve all lengths up to the next multiple of ``SLOT_BUCKET``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import FIELDS, Batch
from vl_jax.model import VisionLanguage, init_cache
from vl_jax.moe import routing
from vl_jax.moe.stacks import RoutingState
from vl_jax.nn.cache import Cache
from vl_jax.params import Leaf

logger = logging.getLogger(__name__)

# Caches of ``stream`` have a multiple of so many slots, so that lengths that differ a little share a program.
SLOT_BUCKET = 256


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen, and for how long."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the most likely token
    top_k: int | None = None  # sample among so many of the most likely tokens
    top_p: float = 1.0  # ... and among the fewest that hold this probability (arXiv 1904.09751)
    repetition_penalty: float = 1.0  # logits of tokens generated before are divided by it (arXiv 1909.05858)
    num_beams: int = 1  # beam search keeps so many continuations
    length_penalty: float = 1.0  # beams compete by log-probability / length ** length_penalty
    prefill_chunk: int | None = None  # prompts are read so many tokens at a time; None: at once

    def __post_init__(self):
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("top_k", "prefill_chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1, or None")
        if self.temperature < 0 or self.repetition_penalty <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be >= 0, repetition_penalty="
                f"{self.repetition_penalty} > 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.num_beams > 1 and self.temperature:
            raise ValueError(f"num_beams={self.num_beams} needs temperature=0: beams are not sampled")


@struct.dataclass
class Course:
    """How far a generation has come, but for its cache."""

    index: Leaf  # i32[] tokens generated
    key: Leaf | None  # randomness of what follows
    logits: Leaf  # f32[B V] of the next token
    used: Leaf | None  # bool[B V] tokens that the repetition penalty is for


def generate(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    model: VisionLanguage,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Int[Array, "B new"]:
    """A continuation of every row.

    Args:
      batch: prompts, left-padded so that all rows end at the last index.
      key: randomness; needed when the temperature is not 0.
      stop: ids that end a row; what follows one comes back as ``stop[0]``.
    """
    loop = _loop(model, config, stop)  # pyright: ignore[reportArgumentType] (modules hash by their fields)
    return loop(params, routing_state, batch, key)


def _generate(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    key: jax.Array | None,
    *,
    model: VisionLanguage,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Int[Array, "B new"]:
    if config.num_beams > 1:
        return _beam_search(params, routing_state, batch, model=model, config=config, stop=stop)
    rows, length = batch.tokens.shape
    logits, cache, vision = prefill(
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
            params, routing_state, batch, vision, course, cache, model=model, config=config
        )
        token = jnp.where(done, stop[0], token)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], course.index, axis=1)
        return after, cache, done | _is_any(token, stop), written

    def unfinished(carry: tuple) -> jax.Array:
        course, _, done, _ = carry
        return (course.index < config.max_new_tokens) & ~jnp.all(done)

    written = jnp.full((rows, config.max_new_tokens), stop[0], jnp.int32)
    course = Course(jnp.zeros((), jnp.int32), key, logits, used)
    return jax.lax.while_loop(unfinished, step, (course, cache, _empty_rows(batch), written))[-1]


def stream(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    model: VisionLanguage,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Iterator[list[int | None]]:
    """The tokens of ``generate``, as they come: one id per row, None for rows that have ended.

    Raises:
      ValueError: beams cannot be streamed, for the best one is known at the end only.
    """
    if config.num_beams > 1:
        raise ValueError(f"num_beams={config.num_beams}: only num_beams=1 can be streamed")
    slots = -(-(batch.tokens.shape[1] + config.max_new_tokens) // SLOT_BUCKET) * SLOT_BUCKET
    logits, cache, vision = _prefill(
        params, routing_state, batch, model=model, slots=slots, chunk=config.prefill_chunk
    )
    done = np.asarray(_empty_rows(batch)).tolist()
    choice = dataclasses.replace(config, max_new_tokens=1)  # lengths share a program
    step = _step(model, choice)  # pyright: ignore[reportArgumentType]
    used = jnp.zeros_like(logits, bool) if config.repetition_penalty != 1 else None
    course = Course(jnp.zeros((), jnp.int32), key, logits, used)
    for _ in range(config.max_new_tokens):
        token, course, cache = step(params, routing_state, batch, vision, course, cache)
        ids = np.asarray(token).tolist()
        done = [ended or i in stop for i, ended in zip(ids, done, strict=True)]
        yield [None if ended else i for i, ended in zip(ids, done, strict=True)]
        if all(done):
            return


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


def choose(
    logits: Float[Array, "B V"],
    key: jax.Array | None,
    used: Bool[Array, "B V"] | None = None,
    *,
    config: GenerationConfig,
) -> Int[Array, " B"]:
    """The next token of every row: the most likely, or one drawn from the filtered distribution.

    Raises:
      ValueError: a temperature without a key.
    """
    if used is not None:
        penalty = config.repetition_penalty
        logits = jnp.where(used, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not config.temperature:
        return _first_highest(logits)
    if key is None:
        raise ValueError(f"temperature={config.temperature} needs a random key; 0 does not")
    return jax.random.categorical(key, keep_likely(logits / config.temperature, config)).astype(jnp.int32)


def _first_highest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """``argmax`` as two plain reductions, which a CPU does in a quarter of the time."""
    last = logits.shape[-1] - 1
    order = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), order, last), axis=-1)


def keep_likely(logits: Float[Array, "B V"], config: GenerationConfig) -> Float[Array, "B V"]:
    """Sets all but the ``top_k`` and ``top_p`` most likely logits to the lowest number.

    A token stays while the probability of the more likely ones is below ``top_p``: the most likely always.
    """
    if config.top_k is None and config.top_p == 1:
        return logits
    ranked = jnp.sort(logits, axis=-1, descending=True)
    kept = min(config.top_k or logits.shape[-1], logits.shape[-1])
    lowest = jnp.finfo(logits.dtype).min
    ranked = jnp.where(jnp.arange(logits.shape[-1]) < kept, ranked, lowest)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    threshold = jnp.min(jnp.where(before < config.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    threshold = jnp.maximum(threshold, ranked[:, kept - 1 : kept])
    return jnp.where(logits >= threshold, logits, lowest)


def _beam_search(
    params: Any,
    routing_state: RoutingState,
    batch: Batch,
    *,
    model: VisionLanguage,
    config: GenerationConfig,
    stop: tuple[int, ...],
) -> Int[Array, "B new"]:
    """The best of ``num_beams`` continuations by log-probability per length ** penalty.

    Every row keeps K running continuations and the K best that have ended. Of the 2 K best extensions at most
    K end (with one stop id), so K go on.
    """
    (rows, length), beams, new = batch.tokens.shape, config.num_beams, config.max_new_tokens
    logits, cache, vision = prefill(
        params, routing_state, batch, model=model, slots=length + new, chunk=config.prefill_chunk
    )
    repeat = functools.partial(jnp.repeat, repeats=beams, axis=0)
    wide, vision, logits = jax.tree.map(repeat, (batch, vision, logits))
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
        ends = _is_any(token, stop)
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
            params, routing_state, wide, vision, token.reshape(-1), index, cache, model=model
        )
        return index + 1, running, tokens, ended, ended_tokens, logits, cache

    def unfinished(carry: tuple) -> jax.Array:
        index, running, _, ended, *_ = carry
        # The best a running continuation can still reach, if every further token were certain.
        longest = jnp.where(config.length_penalty > 0, new, index + 1).astype(jnp.float32)
        hope = jnp.max(running, axis=1) / longest**config.length_penalty
        return (index < new) & jnp.any((hope > jnp.min(ended, axis=1)) & ~_empty_rows(batch))

    start = (jnp.zeros((), jnp.int32), running, blank, jnp.full((rows, beams), low), blank, logits, cache)
    _, running, tokens, ended, ended_tokens, _, _ = jax.lax.while_loop(unfinished, step, start)
    # Whoever ran out of room competes as if it had ended.
    every = jnp.concatenate([ended, running / float(new) ** config.length_penalty], axis=1)
    winner = jnp.argmax(every, axis=1)[:, None, None]
    result = jnp.take_along_axis(jnp.concatenate([ended_tokens, tokens], axis=1), winner, axis=1)[:, 0]
    return jnp.where(_empty_rows(batch)[:, None], stop[0], result)


def answer_ids(tokens: Any, *, stop: Sequence[int]) -> list[list[int]]:
    """The generated ids of every row, up to the first stop token."""
    rows = np.asarray(tokens).tolist()
    return [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in rows]


def _variables(params: Any) -> dict[str, Any]:
    """What the model is applied with: bare parameters, or these and collections, each by its name."""
    return params if "params" in params else {"params": params}


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


_BY_TOKEN = {name: field for name, field in FIELDS.items() if field.axes == ("T",)}


def pad_prompts(batch: Batch, length: int) -> Batch:
    """The prompts with more padding before them, ``length`` tokens in all."""
    more = length - batch.tokens.shape[1]
    padded = {
        name: jnp.pad(getattr(batch, name), ((0, 0), (more, 0)), constant_values=field.padding)
        for name, field in _BY_TOKEN.items()
    }
    return dataclasses.replace(batch, **padded, visual_start=batch.visual_start + more)


def _next_logits(model: VisionLanguage, variables: Any, hidden: jax.Array) -> jax.Array:
    logits: Any = model.apply(variables, hidden[:, -1:], method="logits")
    return logits[:, 0]


def _empty_rows(batch: Batch) -> jax.Array:
    """Rows that hold no prompt at all (they fill up a batch); they are finished from the start."""
    return jnp.max(batch.segment_ids, axis=1) == 0


def _is_any(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return jnp.any(tokens[..., None] == jnp.array(stop, jnp.int32), axis=-1)


def _gather_rows(cache: Cache, rows: jax.Array) -> Cache:
    return dataclasses.replace(
        cache, runs=jax.tree.map(lambda a: a[:, rows], cache.runs), segment_ids=cache.segment_ids[rows]
    )


_prefill = functools.partial(jax.jit, static_argnames=("model", "slots", "chunk"))(prefill)


@functools.cache
def _loop(model: VisionLanguage, config: GenerationConfig, stop: tuple[int, ...]) -> Any:
    """``generate``, compiled."""
    return _compiled(functools.partial(_generate, model=model, config=config, stop=stop))


@functools.cache
def _step(model: VisionLanguage, config: GenerationConfig) -> Any:
    """``advance``, compiled; to find it by model and config takes as long as a layer: once a stream does."""
    return _compiled(functools.partial(advance, model=model, config=config), donate_argnames=("cache",))


def _compiled(function: Any, **options: Any) -> Any:
    """``jax.jit``; on a CPU XLA looks closer at what has to be copied, and extends a cache where it lies."""
    closer = {"xla_cpu_copy_insertion_use_region_analysis": True}
    return jax.jit(function, compiler_options=closer if jax.default_backend() == "cpu" else None, **options)
