"""Training of some experts alone: what belongs to the others keeps its bits, whatever the optimiser.

    gradients --0 for others--> norms, clipping, moments --> updates --minus 0 for others--> parameters

What is an expert's own: its matrices, its column of the router, adapters of these, its part of the scheme's
state. Gradients are cut before anything reads them, and updates after everything, as decay needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax.moe.specialise import per_expert
from vl_jax.moe.stacks import RoutingState, Stacks

Masks = Mapping[str, np.ndarray]  # bool by path, with an axis of experts and of length 1 otherwise


def check(chosen: tuple[int, ...], stacks: Stacks) -> None:
    """Makes sure that every stack has those experts.

    Raises:
      ValueError: one has not, or there is none.
    """
    if not stacks:
        raise ValueError(f"{chosen}: the model has no routed experts; it must be ()")
    for name, stack in stacks.items():
        last = stack.moe.num_experts - 1
        wrong = [number for number in chosen if not 0 <= number <= last]
        if wrong:
            raise ValueError(f"{wrong[0]} is no expert of {name}; expected numbers from 0 to {last}")


def masks(chosen: tuple[int, ...], paths: Iterable[str], params: params_lib.Tree, stacks: Stacks) -> Masks:
    """Which part of the leaves that train may change; leaves that are no experts' are not among them.

    Args:
      chosen: numbers of experts; empty: all, and no mask.
      paths: the leaves that train, adapters among them.
      params: of the model, or their shapes.

    Raises:
      ValueError: there is no such expert, none of what trains is an expert's, or a router that trains has no
        column for each.
    """
    if not chosen:
        return {}
    check(chosen, stacks)
    shapes, found = params_lib.flatten(params), {}
    for stack in stacks.values():
        axes = per_expert.axes(params, stack)
        for path in paths:
            weight = path if path in axes else path.rpartition("/")[0]  # of an adapter, that of its weight
            if weight not in axes:
                continue
            if axes[weight] == -1:
                per_expert.check_columns(stack.moe)
            ndim = shapes[weight].ndim
            # Layers and experts stand first in a weight and in its adapters alike.
            shape = [1] * ndim
            shape[axes[weight]] = stack.moe.num_experts
            found[path] = np.isin(np.arange(stack.moe.num_experts), chosen).reshape(shape)
    if not found:
        raise ValueError(
            f"{chosen}: nothing that trains belongs to an expert; trainable must match its matrices"
        )
    return found


def cut(tree: Any, masks: Masks, other: float) -> Any:
    """A tree of gradients or updates, with ``other`` where nothing may change."""
    if not masks:
        return tree

    def one(path: str, leaf: jax.Array) -> jax.Array:
        return jnp.where(masks[path], leaf, jnp.asarray(other, leaf.dtype)) if path in masks else leaf

    return params_lib.map_paths(one, tree)


def kept_state(new: RoutingState, old: RoutingState, chosen: tuple[int, ...], stacks: Stacks) -> RoutingState:
    """The routing state of which only the chosen experts' parts have moved; all of it without any chosen."""
    if not chosen:
        return new
    return {name: per_expert.merge_state(of, old[name], chosen, stacks[name].moe) for name, of in new.items()}
