"""Batches cut into micro-batches of rows, and put together again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vl_jax.moe.routing import EXCLUDED, ROUTES, TOWARDS
from vl_jax.moe.stacks import RoutingState


def split_rows(batch: Any, parts: int) -> Any:
    """Micro-batches on a new leading axis; part i takes rows i, i + parts, ...: no row changes device."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def given_rows(state: RoutingState, rows: int) -> RoutingState:
    """What an intervention gives for every row of a batch, [L B ...], with rows first: [B L ...]."""
    return {
        stack: {
            name: jnp.moveaxis(of[name], 1, 0)
            for name in (EXCLUDED, ROUTES, TOWARDS)
            if name in of and of[name].shape[1] == rows
        }
        for stack, of in state.items()
    }


def give(state: RoutingState, given: RoutingState) -> RoutingState:
    """The state with what ``given_rows`` found for the rows of a micro-batch, [B L ...] to [L B ...]."""
    return {
        stack: of | {name: jnp.moveaxis(x, 0, 1) for name, x in given.get(stack, {}).items()}
        for stack, of in state.items()
    }


def join_rows(parts: Any) -> Any:
    """The inverse of ``split_rows``: [parts rows ...] to [parts * rows ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
