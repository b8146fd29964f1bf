"""The non-linearity of a feed-forward block, as a hashable value that kernels can be specialised to."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]

FUNCTIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """``f(gate) * up`` when gated (Shazeer 2020, arXiv 2002.05202), else ``f(x)``.

    With a ``limit`` it is the clamped form of GPT-OSS: ``(up + 1) * gate * sigmoid(alpha * gate)``, where
    gate is clamped from above and up on both sides.
    """

    kind: Kind = "silu"
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.702

    def __post_init__(self):
        if self.limit is not None and (not self.gated or self.limit <= 0):
            raise ValueError(f"limit={self.limit} needs gated=True, and must be > 0 (None: no clamping)")

    @property
    def inputs(self) -> int:
        """How many projections of the input it takes: 2 when gated, else 1."""
        return 2 if self.gated else 1

    def __call__(self, hidden: Float[Array, "*batch XF"]) -> Float[Array, "*batch F"]:
        """Hidden units from the concatenated projections [gate | up], or from the only one."""
        return self.of(*jnp.split(hidden, self.inputs, axis=-1))

    def of(
        self, gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"] | None = None
    ) -> Float[Array, "*batch F"]:
        """Hidden units from the projections, one by one."""
        if up is None:
            return FUNCTIONS[self.kind](gate)
        if self.limit is None:
            return FUNCTIONS[self.kind](gate) * up
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


SWIGLU = Activation()
