"""What a routing scheme is given and what it returns: context, assignments, statistics.

TokenChoice   every token names experts        tokens move to experts
ExpertChoice  every expert names tokens        tokens move to experts
Soft          every slot is a mean of tokens   means of tokens move to experts
Merge         a group has a mean of experts    experts' parameters are averaged, tokens stay
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import MODALITIES
from vl_jax.params import Leaf

# The name of the axis over routing groups, for schemes and losses that sum over all of them.
GROUPS = "groups"

State = dict[str, jax.Array]
Losses = dict[str, jax.Array]


@struct.dataclass
class TokenChoice:
    """Every token names K experts. Expert id E means "unused": dynamic k, masked token, dropped choice."""

    experts: Leaf  # i32[T K]
    gates: Leaf  # f32[T K]


@struct.dataclass
class ExpertChoice:
    """Every expert names its C tokens; a gate of zero leaves the slot empty."""

    tokens: Leaf  # i32[E C]
    gates: Leaf  # f32[E C]


@struct.dataclass
class Soft:
    """Every expert has S slots: a slot holds a weighted mean of tokens, a token one of slots' outputs."""

    dispatch: Leaf  # f32[T E S] weights of the tokens in a slot; zero for padding
    combine: Leaf  # f32[T E S] weights of the slots in a token; zero for padding


@struct.dataclass
class Merge:
    """All tokens of the group go through one expert, whose parameters are a weighted mean of all."""

    weights: Leaf  # f32[E]


Choice = TokenChoice | ExpertChoice  # by which tokens move
Assignment = Choice | Soft | Merge


@struct.dataclass
class RoutingContext:
    """What a scheme may look at besides the logits, for one group of T tokens in one layer.

    Attributes:
      valid: bool[T], False on padding, which must choose nothing.
      modality: i32[T], what each token is: an index into ``modalities``.
      tokens: i32[T] token ids; None in encoders of pictures and sounds.
      positions: i32[T], the position in the sample.
      x: [T D], what the router reads.
      rng: a key of the group, in training, for a scheme that declares ``rng=True``; None in evaluation and
        generation: no noise then.
      routes: i32[T K], experts to take whatever their scores, E for none; ``best`` sees to it.
      excluded: bool[T E], experts that a token may not take; ``best`` passes them over.
      content: u32, a number of what is in the group, for noise where there are no tokens.
      previous: f32[T N], the logits of the sparse layer before, zeros in the first one; only for a scheme
        with ``previous=True``.
      params: the scheme's own parameters of this layer, f32, by the names that ``Scheme.params`` gives.
      layer: i32[], the number of this layer among all of its stack, from 0; scanned layers have it too.
      depth: how many layers the stack has, dense ones counted.
      modalities: the names of the modalities; ``len(context.modalities)`` is their number.
    """

    valid: Leaf
    modality: Leaf
    tokens: Leaf | None = None
    positions: Leaf | None = None
    x: Leaf | None = None
    rng: Leaf | None = None
    routes: Leaf | None = None
    excluded: Leaf | None = None
    content: Leaf | None = None
    previous: Leaf | None = None
    params: Leaf | None = None
    layer: Leaf | None = None
    depth: int = struct.field(pytree_node=False, default=1)
    modalities: tuple[str, ...] = struct.field(pytree_node=False, default=MODALITIES)


# What all groups of a layer have in common: it has no axis over groups.
SHARED = ("params", "layer")


def by_group(function: Callable[..., Any], array: jax.Array, context: RoutingContext) -> Any:
    """``function(array [T *], context of one group)`` for every group of ``array`` [G T *], stacked."""
    shared = {name: getattr(context, name) for name in SHARED}
    own: Any = context.replace(**dict.fromkeys(SHARED))  # pyright: ignore[reportAttributeAccessIssue]
    return jax.vmap(lambda a, where: function(a, where.replace(**shared)), axis_name=GROUPS)(array, own)


@struct.dataclass
class RoutingStats:
    """Sums over tokens: add them over micro-batches and shards, then divide."""

    load: Leaf  # i32[M E] choices by modality of the token, before any are dropped
    importance: Leaf  # f32[M E] sum of router probabilities
    tokens: Leaf  # i32[M] valid tokens
    dropped: Leaf  # i32[M] choices without a slot
    measured: Leaf = struct.field(default_factory=dict)  # what the scheme itself measures, summed over groups
    # i32[S] the shards a token's choices are on, were experts cut into each of ``balance.fan_out_shards``;
    # None where tokens do not choose.
    destinations: Leaf | None = None
    figures: dict[str, Leaf] = struct.field(default_factory=dict)  # sums for the log, see ``figures``


# Field -> dtype and axes. T and E are those of the group; of other letters any size will do.
_AXES: dict[type, dict[str, tuple[str, str]]] = {
    TokenChoice: {"experts": ("int32", "T K"), "gates": ("float32", "T K")},
    ExpertChoice: {"tokens": ("int32", "E C"), "gates": ("float32", "E C")},
    Soft: {"dispatch": ("float32", "T E S"), "combine": ("float32", "T E S")},
    Merge: {"weights": ("float32", "E")},
}


def check(result: Any, *, length: int, num_experts: int) -> None:
    """Checks types, dtypes and shapes of what a scheme returned for one group; free at run time.

    Raises:
      ValueError: the first thing that is wrong, in one line.
    """
    if not isinstance(result, tuple) or len(result) != 2 or type(result[0]) not in _AXES:
        kinds = ", ".join(kind.__name__ for kind in _AXES)
        raise ValueError(f"returned {_describe(result)}, expected a pair of one of {kinds}, and losses")
    assignment, losses = result
    sizes = {"T": length, "E": num_experts}
    for field, (dtype, letters) in _AXES[type(assignment)].items():
        value, names = getattr(assignment, field), letters.split()
        shape = getattr(value, "shape", ())
        fits = len(shape) == len(names) and value.dtype == dtype
        if not fits or any(sizes.setdefault(n, s) != s for n, s in zip(names, shape, strict=True)):
            axes = ", ".join(f"{n}={sizes[n]}" if n in sizes else n for n in names)
            raise ValueError(
                f"{type(assignment).__name__}.{field} is {_describe(value)}, expected {dtype}[{axes}]"
            )
    if not isinstance(losses, dict):
        raise ValueError(f"losses are {_describe(losses)}, expected a dict of scalars by name")
    for name, value in losses.items():
        if np.shape(value) != ():
            raise ValueError(f"loss {name!r} is {_describe(value)}, expected a scalar")


def balanced_routes(valid: Bool[Array, "G T"], *, num_experts: int, top_k: int) -> Int[Array, "G T K"]:
    """Experts dealt out to the valid tokens of all groups in turn: no two loads differ by more than one."""
    tokens = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    earlier = jnp.cumsum(tokens[:, -1]) - tokens[:, -1]
    first = top_k * (earlier[:, None] + tokens - 1)
    experts = (first[..., None] + jnp.arange(top_k, dtype=jnp.int32)) % num_experts
    return jnp.where(valid[..., None], experts, num_experts)


def without(assignment: Assignment, excluded: Bool[Array, "G T E"], *, shared: bool) -> Assignment:
    """An assignment in which no token has anything of the experts it may not take; the rest keeps its weight.

    Args:
      assignment: with a leading group axis.
      shared: whether all tokens are denied the same experts.

    Raises:
      ValueError: tokens share one mean of experts, and are not denied the same ones.
    """
    if isinstance(assignment, Merge):
        if not shared:
            raise ValueError(
                "its tokens share one mean of experts, so none can be taken from some of them only"
            )
        return Merge(jnp.where(excluded[:, 0], 0.0, assignment.weights))
    if isinstance(assignment, Soft):
        return jax.tree.map(lambda weights: jnp.where(excluded[..., None], 0.0, weights), assignment)
    if isinstance(assignment, ExpertChoice):
        denied = jnp.take_along_axis(jnp.swapaxes(excluded, 1, 2), assignment.tokens, axis=2)
        return ExpertChoice(assignment.tokens, jnp.where(denied, 0.0, assignment.gates))
    num_experts = excluded.shape[-1]
    denied = jnp.take_along_axis(excluded, jnp.clip(assignment.experts, 0, num_experts - 1), axis=2)
    return TokenChoice(
        jnp.where(denied, num_experts, assignment.experts), jnp.where(denied, 0.0, assignment.gates)
    )


def weights_of(assignment: Assignment, valid: Bool[Array, "G T"], num_experts: int) -> Float[Array, "G T E"]:
    """How much of every expert a token gets."""
    if isinstance(assignment, TokenChoice):
        return jnp.sum(jax.nn.one_hot(assignment.experts, num_experts) * assignment.gates[..., None], axis=2)
    if isinstance(assignment, ExpertChoice):
        tokens = jax.nn.one_hot(assignment.tokens, valid.shape[1])
        return jnp.einsum("GEC,GECT->GTE", assignment.gates, tokens)
    if isinstance(assignment, Soft):
        return jnp.sum(assignment.combine, axis=-1)
    return jnp.where(valid[..., None], assignment.weights[:, None], 0.0)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_describe(v) for v in value)})"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__
