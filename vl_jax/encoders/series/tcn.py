"""Temporal convolutional networks (Bai et al. 2018, arXiv 1803.01271): a step follows from those before.

    series [B L C] -> patches -> block, dilation 1 -> block, 2 -> block, 4 -> ... -> tokens [B T D]
    block: x -> (causal convolution, ReLU) twice -> + x (by a 1x1 convolution where widths differ) -> ReLU

Kernels are normalised: a direction of length 1 for each output, times its gain (Salimans and Kingma 2016).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.series.steps import Pooling, check_steps, grouped, pooled
from vl_jax.encoders.transformer import Encoded
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.layers import Linear, fan_in, named

# [B p D] for each convolution: the steps before the first that it still sees.
Past = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class TCNConfig:
    """An encoder of series; rows differ in length."""

    varies: ClassVar[bool] = True

    channels: int = 1
    max_length: int = 1024  # steps
    patch: int = 1  # steps that are read together
    embed_dim: int = 64
    num_levels: int = 6  # blocks, the dilation of each twice that of the one before
    kernel: int = 3  # steps that a convolution sees
    pooling: Pooling = "last"

    def __post_init__(self):
        check_steps(
            "TCNConfig",
            channels=self.channels,
            max_length=self.max_length,
            patch=self.patch,
            embed_dim=self.embed_dim,
            num_levels=self.num_levels,
            kernel=self.kernel,
        )

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
        return self.embed_dim

    @property
    def grid(self) -> int:
        """Raises ValueError: the tokens of a series form no square."""
        raise ValueError("encoder=TCNConfig: the tokens of a series form no square")

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    @property
    def sees(self) -> int:
        """Tokens that the last one follows from, itself included."""
        return 1 + 2 * (self.kernel - 1) * (2**self.num_levels - 1)

    @property
    def chunk(self) -> int:
        """What the number of steps of a chunk that is streamed must be a multiple of."""
        return self.patch

    @property
    def delay(self) -> int:
        """Steps that are read before the first token is said."""
        return 0

    def begin(self, rows: int) -> Past:
        """The state before the first chunk: nothing."""
        widths = [self.patch * self.channels, *[self.embed_dim] * (2 * self.num_levels - 1)]
        reach = [(self.kernel - 1) * 2 ** (i // 2) for i in range(2 * self.num_levels)]
        return tuple(jnp.zeros((rows, r, w), jnp.float32) for r, w in zip(reach, widths, strict=True))

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> TCN:
        """The module."""
        return TCN(self, jnp.dtype(dtype), remat)


class CausalConv(nn.Module):
    """A dilated convolution that sees a step and those before it."""

    features: int
    kernel: int
    dilation: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], past: Float[Array, "B p D"]
    ) -> tuple[Float[Array, "B T F"], Float[Array, "B p D"]]:
        """What it says of the steps of ``x``, and what it will see of them from the next one on.

        Args:
          past: the steps before the first, as many as it sees.
        """
        init = named(fan_in(in_axis=(0, 1)), None, None, "embed", inputs=(0, 1))
        direction = self.param("direction", init, (self.kernel, x.shape[-1], self.features))
        # He et al. 2015: ReLU halves the variance.
        gain = self.param("gain", named(nn.initializers.constant(2**0.5), "embed"), (self.features,))
        bias = self.param("bias", named(nn.initializers.zeros, "embed"), (self.features,))
        length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1)) + 1e-12)
        weights = direction * (gain / length)
        whole = jnp.concatenate([past.astype(x.dtype), x], axis=1)
        y = jax.lax.conv_general_dilated(
            whole,
            weights.astype(x.dtype),
            (1,),
            "VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + bias.astype(x.dtype), whole[:, x.shape[1] :].astype(past.dtype)


class TCNBlock(nn.Module):
    """Two convolutions, and the input beside them."""

    features: int
    kernel: int
    dilation: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], past: Past) -> tuple[Float[Array, "B T F"], Past]:
        y, kept = x, []
        for i, before in enumerate(past):
            y, after = CausalConv(self.features, self.kernel, self.dilation, name=f"conv{i}")(y, before)
            y = nn.relu(y)
            kept.append(after)
        if x.shape[-1] != self.features:
            x = Linear(self.features, ("embed", None), use_bias=True, name="shortcut")(x)
        return nn.relu(x + y), tuple(kept)


class TCN(nn.Module):
    """The encoder."""

    config: TCNConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    def __call__(
        self,
        series: Float[Array, "B L C"],
        valid: Bool[Array, "B L"],
        routing_state: State | None = None,
    ) -> Encoded:
        """Encodes series, of which ``valid`` steps, the first ones, are there. No layer is sparse."""
        return self.read(series, valid, self.config.begin(series.shape[0]))[0]

    def stream(
        self, chunk: Float[Array, "B l C"], state: Past, valid: Bool[Array, "B l"] | None = None
    ) -> tuple[Encoded, Past]:
        """Encodes the next chunk, whose vector is that of the chunk.

        Args:
          state: of the encoder after the chunk before, or ``TCNConfig.begin``.
          valid: steps that are there, the first ones; None: all.
        """
        return self.read(chunk, jnp.ones(chunk.shape[:2], bool) if valid is None else valid, state)

    @nn.compact
    def read(self, x: Float[Array, "B l C"], valid: Bool[Array, "B l"], past: Past) -> tuple[Encoded, Past]:
        """Tokens of the steps, and what is still seen of them from the next one on."""
        c = self.config
        x, there = grouped(x.astype(self.dtype), valid, c.patch)
        block = nn.remat(TCNBlock, prevent_cse=False) if self.remat else TCNBlock
        kept: list[jax.Array] = []
        for level in range(c.num_levels):
            before = past[2 * level : 2 * level + 2]
            x, after = block(c.embed_dim, c.kernel, 2**level, name=f"block{level}")(x, before)
            kept += after
        x = jnp.where(there[..., None], x, 0)
        return Encoded(x, pooled(x, there, c.pooling), mask=there), tuple(kept)
