"""Experts of one device in bounded memory, however many of the choices are for them.

    tokens |   window 0    |    window 1     | ...     each of as many tokens as have up to P choices here
    window --sort--> rows [P D] --grouped FFN, gates--> rows [P D] --sum of a token's rows--> its tokens

There is room for P rows where any choice might have been for these experts. At about even load one window is
all tokens, and with more choices others follow: a loop, whose length nobody has to know. The backward pass
walks through the same windows and computes their hidden units anew: nothing is kept but what went in.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.kernels.accumulate import add_gradients
from vl_jax.kernels.activation import Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import grouped_mlp
from vl_jax.kernels.permute import gather_rows
from vl_jax.kernels.target import current_target
from vl_jax.moe.assignment import TokenChoice
from vl_jax.params import Leaf

UNROLLED = 16  # choices of a token that are summed without a loop


@dataclasses.dataclass(frozen=True)
class Experts:
    """How a device's experts are computed."""

    activation: Activation
    kernel: str
    room: int  # P

    def products(
        self, rows: jax.Array, sizes: jax.Array, gates: jax.Array, weights: ExpertWeights
    ) -> Float[Array, "P D"]:
        """Rows sorted by expert, through their experts and times their gates."""
        options: Any = {"activation": self.activation, "kernel": self.kernel}
        return grouped_mlp(rows, sizes, weights, gates=gates, **options)


@struct.dataclass
class Window:
    """The choices of some tokens in the order of their experts."""

    choice: Leaf  # i32[P] index t * K + k of the row's choice; any choice where the row is empty
    row: Leaf  # i32[T K] the row of every choice; P where it has none
    sizes: Leaf  # i32[E]


def apply_experts(
    x: Float[Array, "G T D"], assignment: TokenChoice, weights: ExpertWeights, how: Experts
) -> Float[Array, "G T D"]:
    """The experts of this device on the choices that name them; all others are unused.

    Raises:
      ValueError: there is less room than for the choices of one token.
    """
    if how.room < (most := assignment.experts.shape[-1]):
        raise ValueError(f"room={how.room} is less than for the {most} choices of one token")
    experts, gates = by_expert(assignment, weights.w_in.shape[0])
    y: Any = walk(how, x.reshape(-1, x.shape[-1]), experts, gates, weights)
    return y.reshape(x.shape)


def by_expert(
    assignment: TokenChoice, num_experts: int
) -> tuple[Int[Array, "tokens K"], Float[Array, "tokens K"]]:
    """The choices of every token in the order of their experts, unused ones last; groups are joined."""
    experts, gates = (a.reshape(-1, a.shape[-1]) for a in (assignment.experts, assignment.gates))
    if experts.shape[1] == 1:
        return jnp.minimum(experts, num_experts), gates
    order = jnp.argsort(experts, axis=1, stable=True)
    experts, gates = (jnp.take_along_axis(a, order, axis=1) for a in (experts, gates))
    return jnp.minimum(experts, num_experts), gates


def take(rows: Float[Array, "R D"], index: Int[Array, "*N"]) -> Float[Array, "*N D"]:
    """Rows by index; zeros for an index past the last."""
    return rows.at[index].get(mode="fill", fill_value=0)


def sum_rows(
    rows: Float[Array, "R D"], index: Int[Array, "T K"], used: Bool[Array, "T K"], kernel: str
) -> Float[Array, "T D"]:
    """The sum of every token's rows in float32, one choice at a time: [T K D] would be K times the tokens.

    Args:
      used: choices that may have a row; those of a token come before its others.
      kernel: ``pallas``, or any other, which leaves it to XLA.
    """
    columns = index.shape[1]
    if columns <= UNROLLED:
        if kernel == "pallas":
            return gather_rows(rows, index, target=current_target(), name="unpermute")
        total = functools.reduce(jnp.add, (take(rows, i).astype(jnp.float32) for i in index.T))
        return total.astype(rows.dtype)
    last = jnp.max(jnp.sum(used, axis=1, dtype=jnp.int32))

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(index, k, axis=1, keepdims=False)
        return total + take(rows, one).astype(jnp.float32)

    total = jnp.zeros((index.shape[0], rows.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, last, add, total).astype(rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def walk(
    how: Experts,
    x: Float[Array, "T D"],
    experts: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "T D"]:
    """Window after window; choices as ``by_expert`` sorts them."""
    num_experts = weights.w_in.shape[0]

    def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, y = carry
        last, window = _window(first, experts, num_experts, how.room)
        rows, row_gates = x[window.choice // experts.shape[1]], gates.reshape(-1)[window.choice]
        out = how.products(rows, window.sizes, row_gates, weights)
        return last, y + sum_rows(out, window.row, experts < num_experts, how.kernel)

    return _each_window(x.shape[0], one, jnp.zeros_like(x))


def _forward(how: Experts, *arguments: Any) -> tuple[jax.Array, tuple]:
    return walk(how, *arguments), arguments


def _backward(how: Experts, residual: tuple, grad: jax.Array) -> tuple:
    x, experts, gates, weights = residual
    num_experts, top_k = weights.w_in.shape[0], experts.shape[1]

    def one(carry: tuple) -> tuple:
        first, (grad_x, grad_gates, grad_weights) = carry
        last, window = _window(first, experts, num_experts, how.room)
        token = window.choice // top_k
        of_rows, of_gates, grad_weights = add_gradients(
            x[token],
            gates.reshape(-1)[window.choice],
            grad[token],
            window.sizes,
            weights,
            grad_weights,
            activation=how.activation,
            kernel=how.kernel,
        )
        return last, (
            grad_x + sum_rows(of_rows, window.row, experts < num_experts, how.kernel),
            grad_gates + of_gates.at[window.row].get(mode="fill", fill_value=0),
            grad_weights,
        )

    begun = jax.tree.map(jnp.zeros_like, (x, gates, weights))
    grad_x, grad_gates, grad_weights = _each_window(x.shape[0], one, begun)
    return grad_x, None, grad_gates, grad_weights


walk.defvjp(_forward, _backward)


def _each_window(tokens: int, one: Any, begun: Any) -> Any:
    """``one((first token, carry)) -> (first token of the next, carry)`` until there are no more tokens."""
    return jax.lax.while_loop(lambda carry: carry[0] < tokens, one, (jnp.zeros((), jnp.int32), begun))[1]


def _window(
    first: jax.Array, experts: Int[Array, "T K"], num_experts: int, room: int
) -> tuple[jax.Array, Window]:
    """From a token on, as many as have room: (the token after the last, their choices)."""
    last = last_within(first, jnp.sum(experts < num_experts, axis=1, dtype=jnp.int32), room)
    token = jnp.arange(experts.shape[0], dtype=jnp.int32)[:, None]
    here = (token >= first) & (token < last)
    key = jnp.where(here, experts, num_experts).reshape(-1)
    choice, row, ends = sort(key, num_experts, room)
    sizes = jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32))
    return last, Window(choice, row.reshape(experts.shape), sizes)


def last_within(first: jax.Array, counts: Int[Array, " T"], room: int) -> jax.Array:
    """The token after the last of those from ``first`` on that have ``room`` together."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    before = jnp.where(first > 0, ends[jnp.maximum(first - 1, 0)], 0)
    return jnp.searchsorted(ends, before + room, side="right").astype(jnp.int32)


def sort(
    key: Int[Array, " A"], num_keys: int, room: int
) -> tuple[Int[Array, " room"], Int[Array, " A"], Int[Array, " keys"]]:
    """A stable sort of at most ``room`` entries by key; the key ``num_keys`` stands for none.

    Returns:
      The entry in every place, the place of every entry (``room`` for none), and the end of every key.
    """
    order = jnp.argsort(key, stable=True).astype(jnp.int32)[:room]
    place = jnp.full(key.shape, room, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    ends = jnp.searchsorted(key[order], jnp.arange(num_keys), side="right").astype(jnp.int32)
    order = jnp.pad(order, (0, room - order.shape[0]))
    return order, jnp.where(key < num_keys, place, room), ends
