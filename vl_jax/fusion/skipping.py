"""Work that is left out for rows that are closed, and counted: what a hard gate saves.

    is_open [B]  --sort: open rows first--> lax.switch over few sizes --> the rows computed, and 0 elsewhere

A branch that is not taken costs nothing, unless it is mapped over: ``vmap`` of a branch computes both sides.
So there is one decision for all rows of a device, which of a few sizes holds all that are open. With none
open nothing is computed; with the largest size nothing is gathered. What is left out is seen in time and in
the rows counted, not in the compiler's count of operations, which adds up all branches.

On a mesh every device decides for its own rows. The branches hold no collective, so devices may differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.sharding import batch_axes, current_mesh, current_rules

# ``compute(shared, rows)`` gives an array, or a tree of arrays, whose rows are those of ``rows``, a tree too.
Compute = Callable[[Any, Any], Any]


def sizes(rows: int, buckets: int) -> tuple[int, ...]:
    """The numbers of rows that are computed, lowest first: equal shares of all, up to all."""
    return tuple(sorted({math.ceil(rows * i / buckets) for i in range(1, buckets + 1)}))


def open_rows(
    compute: Compute, is_open: Bool[Array, " B"], shared: Any, rows: Any, *, buckets: int
) -> tuple[Any, Float[Array, ""]]:
    """``compute`` for the rows that are open, 0 for the others; and the number of rows computed.

    Args:
      shared: what all rows need, such as parameters; whole on every device.
      buckets: how many sizes there are besides none.
    """

    def local(is_open: jax.Array, shared: Any, rows: Any) -> tuple[Any, jax.Array]:
        def some(size: int) -> Any:
            order = _open_first(is_open, size)
            found = compute(shared, jax.tree.map(lambda a: a[order], rows))

            place = _place(is_open, size)
            return jax.tree.map(lambda values: _only(values[place], is_open), found)

        def every() -> Any:
            return jax.tree.map(lambda values: _only(values, is_open), compute(shared, rows))

        return _ladder(some, every, jnp.sum(is_open), sizes(len(is_open), buckets), each=1)

    return _by_device(local, is_open, shared, rows)


def open_tokens(
    compute: Compute, is_open: Bool[Array, "B T"], shared: Any, tokens: Any, rows: Any, *, buckets: int
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """``compute`` for the tokens that are open, 0 for the others; and the tokens computed.

    Every row has room for the same number of tokens, the smallest size that holds the open ones of each.

    Args:
      compute: takes ``shared`` and ``(tokens, rows)``.
      tokens: arrays [B T ...], of which some tokens are taken.
      rows: arrays [B ...] that are taken whole, such as what tokens look at.
    """

    def local(is_open: jax.Array, shared: Any, parts: Any) -> tuple[jax.Array, jax.Array]:
        tokens, rows = parts
        length, take = is_open.shape[1], jax.vmap(lambda array, order: array[order])

        def some(size: int) -> jax.Array:
            order = jax.vmap(functools.partial(_open_first, size=size))(is_open)
            found = compute(shared, (jax.tree.map(lambda a: take(a, order), tokens), rows))
            return _only(take(found, _place(is_open, size)), is_open)

        def every() -> jax.Array:
            return _only(compute(shared, (tokens, rows)), is_open)

        most = jnp.max(jnp.sum(is_open, axis=1), initial=0)
        return _ladder(some, every, most, sizes(length, buckets), each=len(is_open))

    return _by_device(local, is_open, shared, (tokens, rows))


def _ladder(
    some: Callable[[int], Any],
    every: Callable[[], Any],
    count: Int[Array, ""],
    steps: tuple[int, ...],
    *,
    each: int,
) -> tuple[Any, jax.Array]:
    """The smallest step that holds ``count``: nothing, some rows, or all of them."""
    shapes = jax.eval_shape(every)
    branches = [
        lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes),
        *(functools.partial(some, size) for size in steps[:-1]),
        every,
    ]
    index = jnp.searchsorted(jnp.array((0, *steps)), count)
    rows = jnp.array((0, *steps), jnp.float32)[index] * each
    return jax.lax.switch(index, branches), rows


def _open_first(is_open: Bool[Array, " B"], size: int) -> Int[Array, " size"]:
    """The indices of so many rows, open ones before others, each in order."""
    return jnp.argsort(~is_open, stable=True)[:size]


def _place(is_open: Bool[Array, "*B T"], size: int) -> Int[Array, "*B T"]:
    """Where among the open ones each stands, from 0; of closed ones any place.

    So results are gathered back: scattered, they would be written one after another.
    """
    return jnp.clip(jnp.cumsum(is_open, axis=-1) - 1, 0, size - 1)


def _only(values: jax.Array, is_open: jax.Array) -> jax.Array:
    """The values, and 0 where it is closed: the rows that fill a size up."""
    shape = (*is_open.shape, *(1,) * (values.ndim - is_open.ndim))
    return jnp.where(is_open.reshape(shape), values, jnp.zeros((), values.dtype))


def _by_device(
    local: Callable[..., tuple[Any, jax.Array]], is_open: jax.Array, shared: Any, rows: Any
) -> tuple[Any, jax.Array]:
    """``local`` on the rows of each device; on one device, or where rows do not divide, on all of them."""
    mesh = current_mesh()
    if mesh is None or len(is_open) % batch_axes(mesh, current_rules()):
        return local(is_open, shared, rows)
    whole, batch = jax.sharding.PartitionSpec(), current_rules().spec(("batch",))

    def one(is_open: jax.Array, shared: Any, rows: Any) -> tuple[Any, jax.Array]:
        found, counted = local(is_open, shared, rows)
        return found, counted[None]

    # Parameters come in whole: they are gathered before the branch, never inside it.
    found, counted = jax.shard_map(
        one, mesh=mesh, in_specs=(batch, whole, batch), out_specs=(batch, batch), check_vma=False
    )(is_open, shared, rows)
    return found, jnp.sum(counted)
