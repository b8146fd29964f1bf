"""Rectified flow: straight ways from noise to data, and the steps that follow them.

    x_t = (1 - t) x_0 + t eps         at t = 0 the data, at t = 1 noise
    v   = dx_t / dt = eps - x_0       what a network learns to say of x_t and t

(Liu et al. 2022, arXiv 2209.03003.) In training t is the logistic function of a standard normal number, so
that the middle of the way is learnt most (Esser et al. 2024, arXiv 2403.03206, section 3.1). Guidance goes
beyond what the condition changes (Ho and Salimans 2022, arXiv 2207.12598):
``v = v_without + scale * (v_with - v_without)``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8, UInt32

from vl_jax.params import Leaf

NOISE = "noise"  # the random stream of heads that make what they say out of noise
_SHORTEST = 0.05  # time by which a way is divided
_SLOWEST = 10_000.0  # the longest period of a time, as a multiple of 2 pi times the shortest


@struct.dataclass
class Noisy:
    """Data on its way, and where the way goes."""

    values: Leaf  # f32[B ...] x_t
    time: Leaf  # f32[B] t
    velocity: Leaf  # f32[B ...] eps - x_0
    kept: Leaf  # bool[B] rows that keep their condition


@struct.dataclass
class VelocityGuess:
    """What a network says of the velocity, beside the truth."""

    said: Leaf  # f32[B ...]
    true: Leaf  # f32[B ...]


def to_data(pictures: UInt8[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """Pixels as numbers from -1 to 1."""
    return pictures.astype(jnp.float32) / 127.5 - 1


def on_the_way(
    data: Float[Array, "B *d"], noise: Float[Array, "B *d"], time: Float[Array, " B"]
) -> Float[Array, "B *d"]:
    """``x_t`` of every row."""
    t = time.reshape(-1, *(1,) * (data.ndim - 1))
    return (1 - t) * data + t * noise


def noisy(
    data: Float[Array, "B *d"], content: UInt32[Array, " B"], key: jax.Array, *, dropout: float
) -> Noisy:
    """Every row at a drawn time, with drawn noise.

    Args:
      content: a number of each row. What is drawn follows from it and not from where the row stands, so the
        order of rows, micro-batches and sharding change nothing.
      dropout: share of the draws that lose their condition.
    """

    def draw(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        of_noise, of_time, of_kept = jax.random.split(jax.random.fold_in(key, number), 3)
        noise = jax.random.normal(of_noise, data.shape[1:])
        time = jax.nn.sigmoid(jax.random.normal(of_time))
        return noise, time, jax.random.uniform(of_kept) >= dropout

    noise, time, kept = jax.vmap(draw)(content)
    return Noisy(on_the_way(data, noise, time), time, noise - data, kept)


def euler(
    velocity: Callable[[Float[Array, "B *d"], Float[Array, ""]], Float[Array, "B *d"]],
    noise: Float[Array, "B *d"],
    steps: int,
) -> Float[Array, "B *d"]:
    """Goes from noise at t = 1 to data at t = 0 in equal steps.

    Args:
      velocity: of all rows at a time.
    """

    def step(index: jax.Array, x: jax.Array) -> jax.Array:
        return x - velocity(x, 1 - index / steps) / steps

    return jax.lax.fori_loop(0, steps, step, noise)


def towards(data: Float[Array, "B *d"], x: Float[Array, "B *d"], time: Float[Array, " B"]) -> jax.Array:
    """The velocity at ``x`` of the way that ends at some data: ``(x_t - x_0) / t``.

    A network that says the data need not carry the noise through its widths (Li and He 2025, arXiv
    2511.13720); below the shortest time the velocity is that of a longer way.
    """
    t = jnp.maximum(time, _SHORTEST).reshape(-1, *(1,) * (x.ndim - 1))
    return (x - data) / t


def guided(
    conditional: Float[Array, "B *d"], unconditional: Float[Array, "B *d"], scale: float
) -> Float[Array, "B *d"]:
    """At ``scale`` 1 the conditional velocity, at 0 the unconditional one."""
    return unconditional + scale * (conditional - unconditional)


def time_features(time: Float[Array, " B"], dim: int) -> Float[Array, "B D"]:
    """Cosines and sines of a time in 0..1, of periods from 2 pi / 1000 on."""
    rates = 1000 * _SLOWEST ** (-jnp.arange(dim // 2) / (dim // 2))
    angles = time[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
