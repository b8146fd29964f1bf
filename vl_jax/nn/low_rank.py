"""A low-rank product as a change of a weight: which axes are multiplied, which layers and experts have one.

    weight W   [*stack, *inputs, *outputs]     layers and experts are stacked; heads are inputs or outputs
    factor a   [*stack, *inputs, rank]
    factor b   [*stack, rank, *outputs]
    changed    W + scale * a b

Where only some layers or experts have factors, these axes of ``a`` and ``b`` are as long as there are such.
"""

from __future__ import annotations

import dataclasses
import string

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.roles import Role


@dataclasses.dataclass(frozen=True)
class Only:
    """Which layers and experts of the weights are adapted."""

    layers: tuple[int, ...] = ()  # places in a stack of layers, from 0 in each stack; empty: all
    experts: tuple[int, ...] = ()  # numbers of experts, in weights of experts; empty: all

    def __post_init__(self):
        for name in ("layers", "experts"):
            numbers = getattr(self, name)
            if len(set(numbers)) < len(numbers) or any(number < 0 for number in numbers):
                raise ValueError(f"{name}={numbers} must be different numbers >= 0")


EVERYWHERE = Only()


@dataclasses.dataclass(frozen=True)
class Factors:
    """How a weight is factored: for every axis of ``a`` and ``b`` that of the weight, None for the rank."""

    a: tuple[int | None, ...]
    b: tuple[int | None, ...]
    inputs: tuple[int, ...]
    numbers: tuple[tuple[int, tuple[int, ...]], ...] = ()  # axes of which only these places have factors

    @property
    def product(self) -> str:
        """The einsum that makes the weight's shape of ``a`` and ``b``."""
        a, b = ("".join("Z" if i is None else string.ascii_lowercase[i] for i in x) for x in (self.a, self.b))
        return f"{a},{b}->{''.join(sorted({*a, *b} - {'Z'}))}"


def factors_of(role: Role, shape: tuple[int, ...], only: Only = EVERYWHERE) -> Factors | None:
    """How a weight of a role is factored; None if it is no hidden matrix.

    Raises:
      ValueError: it has no layer or expert of a number.
    """
    if not role.is_matrix:
        return None
    ndim, numbers = len(shape), []
    inputs, outputs = (tuple(a % ndim for a in side) for side in (role.inputs, role.outputs))
    stack = tuple(i for i in range(ndim) if i not in inputs + outputs)
    for name, axis in (("layers", role.layers(ndim)), ("experts", role.experts)):
        chosen = getattr(only, name)
        if axis is None or not chosen:
            continue
        if max(chosen) >= shape[axis]:
            raise ValueError(f"only.{name}={chosen} must be from 0 to {shape[axis] - 1}")
        numbers.append((axis % ndim, chosen))
    return Factors((*stack, *inputs, None), (*stack, None, *outputs), inputs, tuple(numbers))


def filled_up(
    a: Float[Array, "*a rank"], b: Float[Array, "*b"], role: Role, shape: tuple[int, ...], only: Only
) -> tuple[Float[Array, "*a2 rank"], Float[Array, "*b2"]]:
    """The factors of a weight of a shape, with zeros for the layers and experts that have none."""
    factors = factors_of(role, shape, only)
    assert factors is not None, role
    for axis, numbers in factors.numbers:
        places = jnp.array(numbers)
        a, b = (
            _scattered(x, axes.index(axis), places, shape[axis])
            for x, axes in ((a, factors.a), (b, factors.b))
        )
    return a, b


def _scattered(x: jax.Array, axis: int, places: jax.Array, size: int) -> jax.Array:
    zeros = jnp.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
    return zeros.at[(slice(None),) * axis + (places,)].set(x)


def add_product(
    weight: Float[Array, "*weight"],
    a: Float[Array, "*a rank"],
    b: Float[Array, "*b"],
    scale: float,
    role: Role,
) -> Float[Array, "*weight"]:
    """``W + scale * a b`` in float32, cast back to W's dtype; the role says which axes are multiplied."""
    factors = factors_of(role, weight.shape)
    assert factors is not None, role
    product = jnp.einsum(factors.product, a, b, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + scale * product.astype(jnp.float32)).astype(weight.dtype)
