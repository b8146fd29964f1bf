"""Which parameters and which state of sparse layers have a part for every expert, and along which axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax.moe.routing import MoEConfig, State, scheme_of
from vl_jax.moe.stacks import Stack

# Parameters of ``DynamicMoE`` and their axis of experts, from the end, so that layers in front move none.
AXES = {"w_in": -4, "w_out": -3, "b_in": -3, "b_out": -2, "router": -1, "router_bias": -1}


def axes(params: params_lib.Tree, stack: Stack) -> dict[str, int]:
    """The parameters of a stack that have a part for every expert, by path, and the axis, from the end.

    Args:
      params: of the whole model, or their shapes.

    Raises:
      ValueError: its experts differ in width, so that no leaf has a part for each of them.
    """
    check_width(stack.moe)
    flat = params_lib.flatten(params)
    named = (("/".join((*run, name)), axis) for run in stack.runs for name, axis in AXES.items())
    return {path: axis for path, axis in named if path in flat}


def state_names(state: Mapping[str, Any], moe: MoEConfig) -> set[str]:
    """The entries of a scheme's state that have a part for every expert, along their last axis."""
    return {name for name, value in state.items() if value.ndim and value.shape[-1] == moe.num_experts}


def merge_state(new: State, old: State, chosen: Sequence[int], moe: MoEConfig) -> State:
    """The new state of the chosen experts and the old one of the others.

    What is no state of single experts is new.
    """
    names, own = state_names(new, moe), np.isin(np.arange(moe.num_experts), chosen)
    return {k: jnp.where(own, v, old[k]) if k in names else v for k, v in new.items()}


def check_width(moe: MoEConfig) -> None:
    """Makes sure that every leaf has a part for each expert.

    Raises:
      ValueError: they differ in width.
    """
    if moe.widths:
        raise ValueError(
            f"moe.widths={moe.widths}: experts of several widths cannot be chosen, grown or pruned one by "
            "one; it must be ()"
        )


def check_columns(moe: MoEConfig) -> None:
    """Makes sure that every column of the router is that of one expert.

    Raises:
      ValueError: the scheme has other columns.
    """
    scheme = scheme_of(moe)
    columns = scheme.columns(moe)
    if columns != moe.num_experts or not scheme.by_expert:
        raise ValueError(
            f"scheme={moe.scheme!r}: the {columns} columns of its router are not one for each of num_experts="
            f"{moe.num_experts}; it must be a scheme with a column for each, such as 'top_k'"
        )
