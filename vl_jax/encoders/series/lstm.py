"""Series, such as vibrations: long short-term memory over their steps.

series [B L C] -> patches of steps [B T patch*C] -> cells, layer by layer -> tokens [B T H], last or mean
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.series.recurrent import Carry, Recurrent, RecurrentConfig
from vl_jax.encoders.series.steps import Pooling, check_steps, grouped, pooled
from vl_jax.encoders.transformer import Encoded
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """An encoder of series; rows differ in length."""

    varies: ClassVar[bool] = True

    channels: int = 1
    max_length: int = 1024  # steps
    patch: int = 1  # steps that are read together
    recurrent: RecurrentConfig = RecurrentConfig()
    pooling: Pooling = "last"

    def __post_init__(self):
        check_steps("LSTMConfig", channels=self.channels, max_length=self.max_length, patch=self.patch)

    @property
    def input_shape(self) -> tuple[int, int]:
        """The shape of the longest series."""
        return self.max_length, self.channels

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest series."""
        return self.max_length // self.patch

    @property
    def output_dim(self) -> int:
        """Width of a token."""
        return self.recurrent.output_dim

    @property
    def grid(self) -> int:
        """Raises ValueError: the tokens of a series form no square."""
        raise ValueError("encoder=LSTMConfig: the tokens of a series form no square")

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    @property
    def chunk(self) -> int:
        """What the number of steps of a chunk that is streamed must be a multiple of."""
        return self.patch

    @property
    def delay(self) -> int:
        """Steps that are read before the first token is said."""
        return 0

    def begin(self, rows: int) -> tuple[Carry, ...]:
        """The state before the first chunk; raises as ``RecurrentConfig.begin``."""
        return self.recurrent.begin(rows)

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> SeriesLSTM:
        """The module; it keeps what every step says for the backward pass, whatever ``remat`` asks for."""
        return SeriesLSTM(self, jnp.dtype(dtype))


class SeriesLSTM(nn.Module):
    """The encoder."""

    config: LSTMConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        self.recurrent = Recurrent(self.config.recurrent, self.dtype)

    def __call__(
        self,
        series: Float[Array, "B L C"],
        valid: Bool[Array, "B L"],
        routing_state: State | None = None,
    ) -> Encoded:
        """Encodes series, of which ``valid`` steps are there. No layer is sparse."""
        return self._read(series, valid, None)[0]

    def stream(
        self,
        chunk: Float[Array, "B l C"],
        state: tuple[Carry, ...],
        valid: Bool[Array, "B l"] | None = None,
    ) -> tuple[Encoded, tuple[Carry, ...]]:
        """Encodes the next chunk; its vector is that of the chunk with ``mean``, of all so far with ``last``.

        Args:
          state: of the encoder after the chunk before, or ``LSTMConfig.begin``.
          valid: steps that are there; None: all.
        """
        valid = jnp.ones(chunk.shape[:2], bool) if valid is None else valid
        return self._read(chunk, valid, state)

    def _read(
        self, x: Float[Array, "B l C"], valid: Bool[Array, "B l"], state: tuple[Carry, ...] | None
    ) -> tuple[Encoded, tuple[Carry, ...]]:
        x, there = grouped(x.astype(self.dtype), valid, self.config.patch)
        tokens, last, state = self.recurrent(x, there, state)
        vector = last if self.config.pooling == "last" else pooled(tokens, there, "mean")
        return Encoded(tokens, vector, mask=there), state
