"""The choice of the next token: the most likely, or one drawn from the likely ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
