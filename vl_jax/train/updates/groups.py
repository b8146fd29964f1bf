"""Gradients by group: the losses of a step in groups, such as modalities, and what each asks of the weights.

    losses --groups--> one number a group --one forward pass, a backward pass a group--> a gradient a group

An objective says the group of each of its losses by ``groups``: a mapping from loss to group. Without it, the
group of "kind/loss" is "kind". Auxiliary losses, such as the balance of experts, belong to the first group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vl_jax import params as params_lib
from vl_jax.train.objectives.objective import Objective

Grouped = Mapping[str, Any]  # a gradient, as a tree, by group


def groups_of(objective: Objective) -> dict[str, str]:
    """The group of every loss, by its name."""
    told = getattr(objective, "groups", None)
    return {name: told[name] if told else name.rpartition("/")[0] or name for name in objective.weights}


def group_names(objective: Objective) -> tuple[str, ...]:
    """The groups of an objective, in the order of its losses."""
    return tuple(dict.fromkeys(groups_of(objective).values()))


def by_group(
    losses: Mapping[str, jax.Array], auxiliary: jax.Array, objective: Objective
) -> dict[str, jax.Array]:
    """The weighted losses of each group, added up."""
    group_of, found = groups_of(objective), dict[str, list[jax.Array]]()
    for name, value in losses.items():
        found.setdefault(group_of[name], []).append(value * objective.weights[name])
    summed = {group: functools.reduce(jnp.add, found[group]) for group in group_names(objective)}
    first = next(iter(summed))
    return {**summed, first: summed[first] + auxiliary}


def value_and_grads(
    function: Callable[..., tuple[dict[str, jax.Array], Any]], trained: Any, *arguments: Any
) -> tuple[tuple[dict[str, jax.Array], Any], dict[str, Any]]:
    """What ``jax.value_and_grad(function, has_aux=True)`` gives, for a function of one loss a group.

    Returns:
      Losses by group and what comes beside them; gradients by group.
    """
    losses, backward, beside = jax.vjp(lambda x: function(x, *arguments), trained, has_aux=True)
    grads = {
        group: backward({name: jnp.full_like(loss, name == group) for name, loss in losses.items()})[0]
        for group in losses
    }
    return (losses, beside), grads


def grams(grads: Grouped) -> dict[str, jax.Array]:
    """The products of the groups' gradients with one another, f32[G G], in each top-level module."""
    flat = [params_lib.flatten(tree) for tree in grads.values()]
    found: dict[str, jax.Array] = {}
    for path in flat[0]:
        leaves = [tree[path].astype(jnp.float32) for tree in flat]
        module, count = path.split("/")[0], range(len(leaves))
        products = {(i, j): jnp.sum(leaves[i] * leaves[j]) for i in count for j in count[: i + 1]}
        table = jnp.stack([jnp.stack([products[max(i, j), min(i, j)] for j in count]) for i in count])
        found[module] = found[module] + table if module in found else table
    return found


def combined(grads: Grouped, weights: Mapping[str, jax.Array]) -> Any:
    """The weighted sum of the groups' gradients.

    Args:
      weights: f32[G] by top-level module, in the order of the groups.
    """
    flat = [params_lib.flatten(tree) for tree in grads.values()]

    def one(path: str) -> jax.Array:
        of = weights[path.split("/")[0]]
        terms = (of[i].astype(tree[path].dtype) * tree[path] for i, tree in enumerate(flat))
        return functools.reduce(jnp.add, terms)

    return params_lib.unflatten({path: one(path) for path in flat[0]})


def total(grads: Grouped) -> Any:
    """The plain gradient: the sum over the groups."""
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), grads.values())


def figures(names: tuple[str, ...], gram: jax.Array) -> dict[str, jax.Array]:
    """The norm of each group's gradient, and the cosine of each two.

    Args:
      gram: f32[G G] of all that trains.
    """
    norms = jnp.sqrt(jnp.diagonal(gram))
    found = {f"gradients/{name}/norm": norms[i] for i, name in enumerate(names)}
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            product = norms[i] * norms[j]
            cosine = jnp.where(product > 0, gram[i, j] / jnp.where(product > 0, product, 1.0), 0.0)
            found[f"gradients/{other}/{one}/cosine"] = cosine
    return found
