"""Gradient fusion: how the gradients of several groups become one, by a weight for each group and module.

    gradients by group --products with one another, losses, scores--> weights --> one gradient

Every way of fusing here is a weighted sum, and its weights follow from a few numbers: the products of the
groups' gradients. So it costs little, and sharding changes nothing. ``Stage.gradients`` says which.

Adam divides by the size of the gradients it has seen, so it cancels a weight that stays the same: under it,
``at="gradient"`` does little but turn the direction. With ``at="update"`` its second moment, and the limit of
the norm, are of the plain gradient (see ``plain_adam``): then a weight acts on the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from vl_jax import params as params_lib
from vl_jax.params import Leaf
from vl_jax.train.objectives.objective import Objective
from vl_jax.train.updates import groups as groups_lib

At = Literal["gradient", "update"]


@struct.dataclass
class Facts:
    """What weights may follow from; the order of groups is that of ``names``."""

    names: tuple[str, ...] = struct.field(pytree_node=False)  # of the groups
    grams: dict[str, Leaf]  # f32[G G] products of gradients, by top-level module
    losses: Leaf  # f32[G] weighted losses
    scores: dict[str, Leaf]  # f32[] by group: mean probability of the right class, where its head says it
    key: Leaf  # of this step

    @property
    def gram(self) -> jax.Array:
        """The products of gradients over all modules."""
        return sum(self.grams.values(), jnp.zeros((len(self.names),) * 2, jnp.float32))

    def everywhere(self, weights: jax.Array) -> dict[str, jax.Array]:
        """The same weights in every module."""
        return dict.fromkeys(self.grams, weights)


@struct.dataclass
class GroupWeights:
    """What a way of fusing decides for one step."""

    by_module: dict[str, Leaf]  # f32[G] by top-level module
    noise: dict[str, Leaf] = struct.field(default_factory=dict)  # f32[] by module, in deviations of a leaf
    figures: dict[str, Leaf] = struct.field(default_factory=dict)  # f32[] each, logged


@runtime_checkable
class GradientFusion(Protocol):
    """A way of fusing gradients, a frozen dataclass."""

    @property
    def at(self) -> At:
        """What it acts on: the gradient, or Adam's update."""
        ...

    def init(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What it has to remember from step to step, for groups of these names; empty if nothing."""
        ...

    def __call__(self, facts: Facts, state: dict[str, Any]) -> tuple[GroupWeights, dict[str, Any]]:
        """The weights of a step, and what it remembers after it.

        Raises:
          ValueError: it needs something that the objective does not say.
        """
        ...


@struct.dataclass
class Fused:
    """One gradient from several."""

    gradient: Leaf  # a tree
    plain: Leaf  # likewise: the sum without any weights; None where nothing is fused
    state: dict[str, Any]  # of the way of fusing
    figures: dict[str, Leaf]


def fuse(
    way: GradientFusion,
    grads: groups_lib.Grouped,
    state: dict[str, Any],
    *,
    objective: Objective,
    metrics: Mapping[str, Any],
    key: ArrayLike,
) -> Fused:
    """Fuses the gradients of a step.

    Args:
      grads: by group.
      state: what ``way`` remembers.
      metrics: of the step, its losses among them.
      key: a random key of the step.
    """
    names = groups_lib.group_names(objective)
    grads = {name: grads[name] for name in names}  # loops of the compiler put them in another order
    group_of = groups_lib.groups_of(objective)
    losses = {name: metrics[name] for name in group_of}
    by_group = groups_lib.by_group(losses, jnp.zeros(()), objective)
    facts = Facts(
        names=names,
        grams=groups_lib.grams(grads),
        losses=jnp.stack([by_group[name] for name in names]),
        scores=_scores(group_of, metrics),
        key=key,
    )
    weights, state = way(facts, state)
    gradient = groups_lib.combined(grads, weights.by_module)
    if weights.noise:
        gradient = _with_noise(gradient, weights.noise, key)
    figures = groups_lib.figures(names, facts.gram) | weights.figures
    return Fused(gradient, groups_lib.total(grads), state, figures)


PROBABILITY = "probability"  # the metric of a head of classes that says the mean probability of the right one


def _scores(group_of: Mapping[str, str], metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    found: dict[str, list[jax.Array]] = {}
    for loss, group in group_of.items():
        name = f"{loss.rpartition('/')[0]}/{PROBABILITY}"
        if name in metrics:
            found.setdefault(group, []).append(metrics[name])
    return {group: jnp.mean(jnp.stack(values)) for group, values in found.items()}


def _with_noise(gradient: Any, noise: Mapping[str, jax.Array], key: ArrayLike) -> Any:
    flat = params_lib.flatten(gradient)
    for number, path in enumerate(sorted(flat)):
        scale = noise.get(path.split("/")[0])
        if scale is not None:
            leaf = flat[path].astype(jnp.float32)
            drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape)
            flat[path] = (leaf + scale * jnp.std(leaf) * drawn).astype(flat[path].dtype)
    return params_lib.unflatten(flat)
