"""Experts that a model has more than the checkpoint it begins with; see ``moe.specialise.growing``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax

from vl_jax.layout import Layout
from vl_jax.moe.specialise import growing, per_expert
from vl_jax.moe.specialise.growing import GrowthConfig
from vl_jax.moe.stacks import Stacks

logger = logging.getLogger(__name__)

_WHERE = "config.init_experts"


def places(
    stacks: Stacks, have: Mapping[str, Any], need: Mapping[str, Any], config: GrowthConfig, *, where: str
) -> dict[str, int]:
    """The leaves that are to get more experts, by path, and their axis of these, from the end.

    Args:
      stacks: of the model.
      have, need: leaves of the checkpoint and of the model by path; below ``params/`` are the parameters.
      where: name of the checkpoint.

    Raises:
      ValueError: there are none, or fewer than before; a copy is of an expert that is not there; or a
        stack's router has no column for each expert.
    """
    found: dict[str, int] = {}
    params = {path.removeprefix("params/"): leaf for path, leaf in need.items() if path.startswith("params/")}
    for stack in stacks.values():
        axes = {f"params/{path}": axis for path, axis in per_expert.axes(params, stack).items()}
        other = [p for p in axes if p in have and tuple(have[p].shape) != tuple(need[p].shape)]
        if not other:
            continue
        try:
            per_expert.check_columns(stack.moe)
        except ValueError as error:
            raise ValueError(f"{_WHERE}: {error}") from None
        had, now = have[other[0]].shape[axes[other[0]]], stack.moe.num_experts
        if had >= now:
            raise ValueError(f"{_WHERE}: {where} has {had} experts, the model {now}; they can only be more")
        if wrong := [number for number in config.copies if not 0 <= number < had]:
            raise ValueError(f"{_WHERE}.copies: {wrong[0]} is no expert of {where}; expected 0 to {had - 1}")
        found |= {path: axes[path] for path in other}
    if not found:
        raise ValueError(
            f"{_WHERE}: {where} has as many experts as the model in every sparse layer; set moe.num_experts "
            "above that, or init_experts=None"
        )
    return found


def leaves(
    smaller: Mapping[str, jax.Array],
    fresh: Mapping[str, jax.Array],
    axes: Mapping[str, int],
    layout: Layout,
    config: GrowthConfig,
    *,
    seed: int,
) -> dict[str, jax.Array]:
    """Leaves with all experts of the model, where they live.

    Args:
      smaller: those of the checkpoint, by path.
      fresh: those of the model as it would begin without it.
      axes: what ``places`` gave.

    Raises:
      ValueError: a leaf does not grow; one line that names it.
    """
    found = {}
    for number, (path, axis) in enumerate(sorted(axes.items())):
        key = jax.random.fold_in(jax.random.key(seed), number)
        grow = functools.partial(growing.grow_leaf, axis=axis, config=config, key=key)
        name = path.removeprefix("params/")
        try:
            longer = jax.jit(grow, out_shardings=fresh[path].sharding)
            found[path] = longer(smaller[path], jax.device_put(fresh[path], layout.replicated))
        except ValueError as error:
            raise ValueError(f"{_WHERE}: {name}: {error}") from None
        counts = smaller[path].shape[axis], found[path].shape[axis]
        logger.info("init: %s grows from %d to %d experts", name, *counts)
    return found
