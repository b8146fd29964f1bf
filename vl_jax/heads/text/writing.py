"""Writing: the text that the tokens of a stream ask for, byte by byte.

    begin, bytes so far --embed--> (+ bytes before, + stream, + MLP) x L --norm--> scores of the next byte

A text is UTF-8, so it may be in any language; a byte of its own ends it. In training every byte is scored
behind the true ones, which ``Heads`` hands to the module as a hint; without any it writes the likeliest, each
behind those it has written, all of which it reads anew: texts are short.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.batch import Given
from vl_jax.data.sample import BadSample, Sample
from vl_jax.encoders.transformer import Attention
from vl_jax.fusion.streams import Stream, Streams
from vl_jax.nn.layers import LayerNorm, Linear, named
from vl_jax.params import Leaf

_END, _BEGIN, _SCORED = 256, 257, 257  # what ends a text, what stands before it, and how many can follow
_NONE = -1  # behind the end


@struct.dataclass
class NextBytes:
    """What may follow the true bytes before."""

    scores: Leaf  # f32[B N 257] of each byte, and of the end


@dataclasses.dataclass(frozen=True)
class Writing:
    """Who writes what; the label of a sample is a text."""

    name: str = "words"
    stream: str = "image"  # whose tokens it reads
    field: str = "words"  # name in ``Sample.labels``
    max_length: int = 32  # bytes of the longest text, its end included
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4

    def __post_init__(self):
        if self.max_length < 1 or self.num_layers < 1:
            raise ValueError(
                f"max_length={self.max_length}, num_layers={self.num_layers} of head {self.name!r}: "
                "must be >= 1"
            )
        if self.num_heads < 1 or self.dim < 1 or self.dim % self.num_heads:
            raise ValueError(
                f"dim={self.dim} of head {self.name!r} is not a multiple of num_heads={self.num_heads}"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """A number for each byte."""
        return (self.max_length,)

    @property
    def dtype(self) -> str:
        """Bytes, 256 at the end, and -1 behind it."""
        return "int32"

    def read(self, sample: Sample) -> np.ndarray | None:
        """The bytes of the sample's text; None if it has none.

        Raises:
          BadSample: the label is no text, or too long.
        """
        text = sample.labels.get(self.field)
        if text is None:
            return None
        where = f"sample {sample.id}: {self.field}"
        if not isinstance(text, str):
            raise BadSample("bad_label", f"{where}={text!r} is no text")
        content = [*text.encode("utf-8"), _END]
        if len(content) > self.max_length:
            rule = f"head {self.name!r} has max_length={self.max_length}, its end included"
            raise BadSample("label_too_long", f"{where} has {len(content) - 1} bytes; {rule}")
        result = np.full(self.max_length, _NONE, np.int32)
        result[: len(content)] = content
        return result

    def build(self) -> nn.Module:
        """The module."""
        return WritingHead(self)

    def led(self, label: Given) -> Int[Array, "B N"]:
        """What the module is told of the texts in training: it reads the bytes before each."""
        return jnp.asarray(label.values)

    def sums(
        self, prediction: NextBytes | Int[Array, "B N"], label: Given
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean loss of a byte in nats, summed over the rows that have a text.

        ``exact`` counts the texts of which every byte is the likeliest: those that would be written so.

        Raises:
          ValueError: the prediction is what was written, for no text was handed to the head.
        """
        if not isinstance(prediction, NextBytes):
            raise ValueError(f"head {self.name!r} learns behind true bytes: train it by Heads or Denoising")
        values = jnp.asarray(label.values)
        truth, there = jnp.maximum(values, 0), values != _NONE
        losses = optax.softmax_cross_entropy_with_integer_labels(prediction.scores, truth)
        count = jnp.maximum(jnp.sum(there, axis=1), 1).astype(jnp.float32)
        loss = jnp.sum(jnp.where(there, losses, 0.0), axis=1) / count
        exact = jnp.all((jnp.argmax(prediction.scores, axis=-1) == truth) | ~there, axis=1)
        exact = (exact & label.present).astype(jnp.float32)
        return jnp.sum(jnp.where(label.present, loss, 0.0)), {"exact": jnp.sum(exact)}

    def text_of(self, written: Int[np.ndarray, " N"]) -> str:
        """The text that a label stands for, or that was written; what is no UTF-8 is replaced."""
        content = [int(number) for number in written]
        if _END in content:
            content = content[: content.index(_END)]
        return bytes(number for number in content if number != _NONE).decode("utf-8", errors="replace")

    def decode(self, prediction: Int[np.ndarray, " N"]) -> str:
        """The text of one row."""
        return self.text_of(np.asarray(prediction))


class WritingHead(nn.Module):
    """Scores of the next bytes; without true ones, what it writes, i32[B N]."""

    config: Writing

    def setup(self):
        c = self.config
        init = nn.initializers.normal(0.02)
        self.bytes = self.param("bytes", named(init, None, "embed"), (_BEGIN + 1, c.dim))
        self.places = self.param("places", named(init, None, "embed"), (c.max_length, c.dim))
        self.asked_norm = LayerNorm()
        self.asked = Linear(c.dim, (None, "embed"), use_bias=True)
        self.blocks = [_Block(c) for _ in range(c.num_layers)]
        self.norm = LayerNorm()
        self.next = Linear(_SCORED, ("embed", None), use_bias=True, hidden=False)

    def __call__(self, streams: Streams, given: Int[Array, "B N"] | None = None) -> NextBytes | jax.Array:
        """Scores what follows true bytes; without any, writes."""
        stream = streams[self.config.stream]
        if given is not None:
            return NextBytes(self.scores(stream, given))
        if self.is_initializing():
            empty = jnp.full((stream.tokens.shape[0], self.config.max_length), _NONE, jnp.int32)
            return NextBytes(self.scores(stream, empty))
        return self._write(stream)

    def scores(self, stream: Stream, written: Int[Array, "B N"]) -> Float[Array, "B N 257"]:
        """What may follow the bytes before each place."""
        rows, length = written.shape
        before = jnp.pad(written, ((0, 0), (1, 0)), constant_values=_BEGIN)[:, :-1]
        x = self.bytes[jnp.where(before == _NONE, _END, before)] + self.places
        asked = self.asked(self.asked_norm(stream.tokens.astype(jnp.float32)))
        earlier = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
        for block in self.blocks:
            x = block(x, asked, earlier, stream.mask[:, None])
        return self.next(self.norm(x))

    def _write(self, stream: Stream) -> Int[Array, "B N"]:
        c = self.config
        free: Any = self.clone(parent=None, name=None)  # a loop holds no bound module
        variables = self.variables
        written = jnp.full((stream.tokens.shape[0], c.max_length), _NONE, jnp.int32)

        def step(place: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            written, ended = so_far
            scores = free.apply(variables, stream, written, method="scores")[:, place]
            chosen = jnp.where(ended, _NONE, jnp.argmax(scores, axis=-1).astype(jnp.int32))
            return written.at[:, place].set(chosen), ended | (chosen == _END)

        ended = jnp.zeros(written.shape[0], bool)
        return jax.lax.fori_loop(0, c.max_length, step, (written, ended))[0]


class _Block(nn.Module):
    """Attention to the bytes before, attention to the stream, and a feed-forward layer."""

    config: Writing

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], asked: Float[Array, "B T D"], earlier: jax.Array, there: jax.Array
    ) -> Float[Array, "B N D"]:
        c = self.config
        x = x + Attention(c.num_heads, name="attention")(LayerNorm(name="norm0")(x), mask=earlier)
        x = x + Attention(c.num_heads, name="look")(LayerNorm(name="norm1")(x), asked, mask=there)
        y = Linear(4 * c.dim, ("embed", "mlp"), use_bias=True, name="fc1")(LayerNorm(name="norm2")(x))
        return x + Linear(c.dim, ("mlp", "embed"), use_bias=True, name="fc2")(jax.nn.gelu(y))
