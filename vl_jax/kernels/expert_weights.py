"""The parameters of E feed-forward blocks, and the one product that all forms of them are made of."""

from __future__ import annotations

import jax
from flax import struct

from vl_jax.params import Leaf


@struct.dataclass
class ExpertWeights:
    """The parameters of E feed-forward blocks; X is 2 when the activation is gated, else 1."""

    w_in: Leaf  # [E D X F]
    w_out: Leaf  # [E F D]
    b_in: Leaf | None = None  # [E X F]
    b_out: Leaf | None = None  # [E D]


def flat(w_in: jax.Array) -> jax.Array:
    """[... D X F] to [... D X*F], so that one product gives every projection."""
    return w_in.reshape(*w_in.shape[:-2], -1)


def project(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """``x @ w``, and a bias if there is one."""
    y = x @ w
    return y if b is None else y + b.reshape(-1)
