"""Long short-term memory (Hochreiter and Schmidhuber 1997) over steps of which some are not there.

    x [B T D] --cell, step by step--> hidden [B T H]      a step that is not there changes no state

So padding may stand anywhere, and a pass from the end begins at the last step that is there.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.nn.layers import fan_in, named

Carry = tuple[jax.Array, jax.Array]  # [B H] of one layer: what its cell remembers, and what it said last


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Layers of such cells."""

    hidden_dim: int = 128
    num_layers: int = 1
    bidirectional: bool = False  # each layer also reads from the end; such a one cannot stream

    def __post_init__(self):
        if min(self.hidden_dim, self.num_layers) < 1:
            raise ValueError(
                f"hidden_dim={self.hidden_dim}, num_layers={self.num_layers}: must be at least 1"
            )

    @property
    def output_dim(self) -> int:
        """Width of a step."""
        return self.hidden_dim * (2 if self.bidirectional else 1)

    def begin(self, rows: int) -> tuple[Carry, ...]:
        """The state of all layers before the first step.

        Raises:
          ValueError: the layers read from the end as well.
        """
        if self.bidirectional:
            raise ValueError("bidirectional=True reads from the end, so nothing can be said before it")
        nothing = jnp.zeros((rows, self.hidden_dim), jnp.float32)
        return tuple((nothing, nothing) for _ in range(self.num_layers))


class _Step(nn.Module):
    hidden_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry: Carry, step: tuple[jax.Array, jax.Array]) -> tuple[Carry, jax.Array]:
        x, there = step
        cell = nn.OptimizedLSTMCell(
            self.hidden_dim,
            kernel_init=named(fan_in(), "embed", None, inputs=(0,)),
            recurrent_kernel_init=named(nn.initializers.orthogonal(), None, None, inputs=(0,)),
            bias_init=named(nn.initializers.zeros, None),
            dtype=self.dtype,
            name="cell",
        )
        after, hidden = cell(carry, x)
        there = there[:, None]
        kept = jax.tree.map(lambda new, old: jnp.where(there, new.astype(old.dtype), old), after, carry)
        return kept, jnp.where(there, hidden, 0)


class Recurrent(nn.Module):
    """The layers."""

    config: RecurrentConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        state: tuple[Carry, ...] | None = None,
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B H"], tuple[Carry, ...]]:
        """Reads the steps.

        Args:
          state: of every layer before the first step; None: as ``RecurrentConfig.begin`` says.

        Returns:
          what the last layer says at each step, zeros where none is; what it said last, in both directions;
          and the state of every layer behind the last step.
        """
        c, rows = self.config, x.shape[0]
        nothing = jnp.zeros((rows, c.hidden_dim), jnp.float32)
        last, carries = nothing, []
        for layer in range(c.num_layers):
            start = (nothing, nothing) if state is None else state[layer]
            carry, hidden = self._pass(f"layer{layer}")(start, (x, valid))
            carries.append(carry)
            last = carry[1]
            if c.bidirectional:
                backward = self._pass(f"layer{layer}_backward")
                carry, behind = backward((nothing, nothing), (x[:, ::-1], valid[:, ::-1]))
                hidden = jnp.concatenate([hidden, behind[:, ::-1]], axis=-1)
                last = jnp.concatenate([last, carry[1]], axis=-1)
            x = hidden
        return x, last.astype(self.dtype), tuple(carries)

    def _pass(self, name: str) -> nn.Module:
        scanned = nn.scan(
            _Step,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        return scanned(self.config.hidden_dim, self.dtype, name=name)
