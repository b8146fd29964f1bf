"""Experts added to sparse layers that have learnt; those that there were keep their bits.

    w_in  [.. E D I H] --> [.. E+n D I H]     router  [.. D E] --> [.. D E+n]     state  [.. E] --> [.. E+n]

A new expert begins as a copy of an old one (sparse upcycling does so with a dense block: Komatsuzaki et al.
2023, arXiv 2212.05055, section 3), or afresh; so does its column of the router. While no token may take the
new ones (``routing.EXCLUDED``), the layer says what it said before; but where a factor sets the slots of an
expert, or experts choose tokens, there are fewer slots for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax import params as params_lib
from vl_jax.moe.routing import State
from vl_jax.moe.specialise import per_expert
from vl_jax.moe.stacks import Stack


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """How the experts begin that a model has more than the run that it begins with."""

    copies: tuple[
        int, ...
    ] = ()  # old experts that the new ones are copies of, in turn; empty: they begin afresh
    noise: float = 0.0  # added to copies: its standard deviation, over that of the old experts' numbers

    def __post_init__(self):
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise={self.noise} of new experts must be >= 0 and finite")
        if self.noise and not self.copies:
            raise ValueError(f"noise={self.noise} is added to copies of experts, and copies=() names none")


def grow_leaf(
    old: Float[Array, "..."], fresh: Float[Array, "..."], axis: int, config: GrowthConfig, key: jax.Array
) -> Float[Array, "..."]:
    """An array with a part for every expert, made longer.

    Args:
      old: its parts come first, as they are.
      fresh: of the new length; a new expert has its part of it, unless it is a copy.
      axis: of experts.

    Raises:
      ValueError: it does not get longer, another axis differs, or a copy is of an expert that is not there.
    """
    axis %= fresh.ndim
    have, need = (tuple(x.shape[:axis] + x.shape[axis + 1 :]) for x in (old, fresh))
    count, total = old.shape[axis], fresh.shape[axis]
    if have != need or count >= total:
        raise ValueError(f"{tuple(old.shape)} does not grow to {tuple(fresh.shape)} along axis {axis}")
    wrong = [number for number in config.copies if not 0 <= number < count]
    if wrong:
        raise ValueError(f"copies names expert {wrong[0]}; there are 0 to {count - 1}")
    if config.copies:
        parents = [config.copies[i % len(config.copies)] for i in range(total - count)]
        new = jnp.take(old, jnp.asarray(parents), axis=axis)
        if config.noise:
            new = new + config.noise * jnp.std(old) * jax.random.normal(key, new.shape, old.dtype)
    else:
        new = jax.lax.slice_in_dim(fresh, count, total, axis=axis)
    return jnp.concatenate([old, new.astype(old.dtype)], axis=axis)


def grow(
    params: params_lib.Tree, fresh: params_lib.Tree, stack: Stack, config: GrowthConfig, key: jax.Array
) -> dict[str, params_lib.Leaf]:
    """Parameters of a model with more experts in a stack; all other leaves are as they were.

    Args:
      fresh: parameters of the larger model.
      stack: of the larger model.

    Raises:
      ValueError: as ``grow_leaf``; or the router has other columns than one for every expert.
    """
    per_expert.check_columns(stack.moe)
    result, larger = params_lib.flatten(params), params_lib.flatten(fresh)
    places = per_expert.axes(fresh, stack)
    for one, (path, axis) in zip(jax.random.split(key, len(places)), sorted(places.items()), strict=True):
        result[path] = grow_leaf(result[path], larger[path], axis, config, one)
    return params_lib.unflatten(result)


def grow_state(old: Mapping[str, Any], fresh: State, stack: Stack, config: GrowthConfig) -> State:
    """State of a scheme with more experts; copies have that of their parents, without noise.

    Args:
      old: arrays of the smaller model, by name; one may be lacking.
    """
    plain = dataclasses.replace(config, noise=0.0)
    names = per_expert.state_names(fresh, stack.moe)

    def grown(name: str) -> jax.Array:
        have, need = jnp.asarray(old[name]), fresh[name]
        longer = name in names and have.shape != need.shape
        return grow_leaf(have, need, -1, plain, jax.random.key(0)) if longer else have

    return {name: grown(name) if name in old else value for name, value in fresh.items()}
