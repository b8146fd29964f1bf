"""Transcripts: what is said in a sound, letter by letter, by connectionist temporal classification.

    Stream.tokens [T D] --> scores [T K] --likeliest--> symbols [T] --merge repeats, drop blanks--> text

The loss sums over all ways to stretch the text over the tokens (Graves et al. 2006, section 3).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.batch import Given
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Streams
from vl_jax.heads.edits import edit_distances
from vl_jax.nn.layers import Linear
from vl_jax.params import Leaf

_NONE = -1  # behind the last symbol of a text
LETTERS = ("", " ", "'", *"abcdefghijklmnopqrstuvwxyz")


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The text of a sound."""

    symbols: tuple[str, ...] = LETTERS  # what each class writes; the blank writes nothing
    blank: int = 0  # the class that stands between symbols
    name: str = "transcript"
    stream: str = "sound"  # whose tokens it reads
    field: str = "transcript"  # name in ``Sample.labels``, a text
    max_length: int = 128  # symbols of the longest text
    by_symbol: bool = True  # each row's loss is divided by the length of its text

    def __post_init__(self):
        if len(self.symbols) < 2 or not 0 <= self.blank < len(self.symbols):
            raise ValueError(
                f"blank={self.blank} of head {self.name!r} must be one of its symbols, which must be two or "
                f"more; there are {len(self.symbols)}"
            )
        written = [s for i, s in enumerate(self.symbols) if i != self.blank and s]
        twice = next((s for s in written if written.count(s) > 1), None)
        if twice is not None:
            raise ValueError(f"symbols of head {self.name!r} have {twice!r} twice: expected each once")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} of head {self.name!r} must be >= 1")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """A class for each symbol of the text."""
        return (self.max_length,)

    @property
    def dtype(self) -> str:
        """The index of a symbol, or -1 behind the last."""
        return "int32"

    def read(self, sample: Sample) -> np.ndarray | None:
        """The symbols of the sample's text; a letter that is no symbol is written in the other case.

        Raises:
          BadSample: the label is no text, too long, or has a letter that is no symbol in either case.
        """
        text = sample.labels.get(self.field)
        if text is None:
            return None
        where = f"sample {sample.id}: {self.field}"
        if not isinstance(text, str):
            raise BadSample("bad_label", f"{where}={text!r} is no text")
        if len(text) > self.max_length:
            rule = f"head {self.name!r} has max_length={self.max_length}"
            raise BadSample("label_too_long", f"{where} has {len(text)} letters; {rule}")
        classes = {s: i for i, s in enumerate(self.symbols) if i != self.blank and s}
        result = np.full(self.max_length, _NONE, np.int32)
        for i, letter in enumerate(text):
            found = next((c for c in (letter, letter.lower(), letter.upper()) if c in classes), None)
            if found is None:
                message = f"{where} has {letter!r}, which is no symbol of head {self.name!r}"
                raise BadSample("unknown_symbol", message)
            result[i] = classes[found]
        return result

    def build(self) -> nn.Module:
        """The module."""
        return TranscriptHead(self)

    def sums(
        self, prediction: SymbolScores, label: Given
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss in nats, and ``cer``, the letters that are wrong per letter of the text; summed over rows.

        A row whose tokens are too few for its text has no loss.
        """
        lengths = jnp.sum(label.values != _NONE, axis=1)
        there = label.present.astype(jnp.float32)
        share = there / jnp.maximum(lengths, 1).astype(jnp.float32)
        losses = row_losses(prediction, label.values, blank=self.blank)
        loss = jnp.sum(losses * (share if self.by_symbol else there))
        heard = edit_distances(self._likeliest(prediction), label.values, none=_NONE)
        return loss, {"cer": jnp.sum(heard * share)}

    def _likeliest(self, prediction: SymbolScores) -> Int[Array, "B T"]:
        """The symbol of each token, -1 where it repeats the one before, is blank or is not there."""
        best = jnp.argmax(prediction.scores, axis=-1)
        before = jnp.pad(best, ((0, 0), (1, 0)), constant_values=_NONE)[:, :-1]
        return jnp.where((best != before) & (best != self.blank) & prediction.mask, best, _NONE)

    def decode(self, prediction: SymbolScores) -> str:
        """The text of one row."""
        row = SymbolScores(*(jnp.asarray(x)[None] for x in (prediction.scores, prediction.mask)))
        return "".join(self.symbols[i] for i in np.asarray(self._likeliest(row))[0] if i != _NONE)

    def text_of(self, symbols: Int[np.ndarray, " N"]) -> str:
        """The text that a label stands for."""
        return "".join(self.symbols[i] for i in symbols if i != _NONE)


@struct.dataclass
class SymbolScores:
    """What the head says of every token of the stream."""

    scores: Leaf  # f32[B T K]
    mask: Leaf  # bool[B T] tokens that are there


def row_losses(prediction: SymbolScores, labels: Int[Array, "B N"], *, blank: int) -> Float[Array, " B"]:
    """The negative log-likelihood of each text; 0 of one that its tokens are too few for."""
    padded = labels == _NONE
    again = jnp.sum((labels[:, 1:] == labels[:, :-1]) & ~padded[:, 1:], axis=1)  # with a blank between
    needed = jnp.sum(~padded, axis=1) + again
    with jax.default_matmul_precision("float32"):  # it picks scores by products
        losses = optax.ctc_loss(
            prediction.scores,
            1.0 - prediction.mask.astype(jnp.float32),
            jnp.where(padded, 0, labels),
            padded.astype(jnp.float32),
            blank_id=blank,
        )
    return jnp.where(needed <= jnp.sum(prediction.mask, axis=1), losses, 0.0)


class TranscriptHead(nn.Module):
    """Scores in float32."""

    config: Transcript

    @nn.compact
    def __call__(self, streams: Streams) -> SymbolScores:
        stream, classes = streams[self.config.stream], len(self.config.symbols)
        head = Linear(classes, ("embed", None), use_bias=True, hidden=False, name="symbols")
        return SymbolScores(head(stream.tokens).astype(jnp.float32), stream.mask)
