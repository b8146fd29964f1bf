"""Layers with fewer experts: the least harmful ones are left out, or merged into those that stay.

    knock-out table [L E] --least harm--> kept [L E']          --> mixing [L E' E], rows that choose
    routers, load         --who is alike--> groups of experts  --> mixing [L E' E], rows of shares of use

    leaf [L .. E ..] --mixing--> [L .. E' ..]

A merged expert is the mean of its group, weighted by use (arXiv 2310.01334, section 3.2). The hidden units of
the others are put in the order of the one that stays first, as any order computes the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vl_jax.moe import routing
from vl_jax.moe.assignment import RoutingContext, weights_of
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.specialise import per_expert

_GROUPS, _LENGTH = 4, 16  # of what is tried
# Of the leaves of an expert, the axis of its hidden units without those of layers and experts.
_UNITS = {"w_in": -1, "w_out": 0, "b_in": -1}
Leaves = dict[str, np.ndarray]  # of the sparse layers of one run, by name: [L ...]


def smaller(config: MoEConfig, share: float) -> MoEConfig:
    """The config of a layer that loses a share of its experts, rounded to whole ones.

    Raises:
      ValueError: none or too many are left, or an expert's number says what it does; one line.
    """
    count = config.num_experts - round(share * config.num_experts)
    if not 0 < share < 1 or not config.top_k <= count < config.num_experts:
        raise ValueError(
            f"share={share} leaves {count} of {config.num_experts} experts; there must be fewer, and "
            f"top_k={config.top_k} at least"
        )
    per_expert.check_width(config)
    per_expert.check_columns(config)
    if config.simple.num:
        raise ValueError(f"simple has {config.simple.num} experts without matrices, which are not pruned")
    fewer = dataclasses.replace(config, num_experts=count)
    _check_numbers(config, fewer)
    return fewer


def _check_numbers(config: MoEConfig, fewer: MoEConfig) -> None:
    """Makes sure that the smaller layer routes as the larger one whose other experts are taken away."""
    random, number = np.random.default_rng(0), fewer.num_experts
    scheme, shape = routing.scheme_of(config), (_GROUPS, _LENGTH)
    if scheme.logits is not None:
        raise ValueError(f"scheme={config.scheme!r} has a router of its own, whose outputs are not cut")
    kept = np.arange(config.num_experts)[-number:]  # in no place is a number as it was
    index = np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), shape)
    logits = jnp.asarray(random.standard_normal((*shape, config.num_experts), np.float32))
    context = RoutingContext(
        valid=jnp.ones(shape, bool),
        modality=jnp.asarray(index % 2),
        tokens=jnp.asarray(random.integers(0, 1000, shape).astype(np.int32)),
        positions=jnp.asarray(index),
        previous=logits if scheme.previous else None,
        layer=jnp.int32(0),
    )
    gone = ~np.isin(np.arange(config.num_experts), kept)

    def weights(config: MoEConfig, logits: jax.Array, state: Mapping[str, Any]) -> np.ndarray:
        own: Any = context
        if scheme.previous:
            own = own.replace(previous=logits)
        route = jax.jit(lambda z, where, state: routing.route(z, where, state, config)[0])
        found = route(logits, own, {**routing.init_state(config), **state})
        return np.asarray(weights_of(found, context.valid, config.num_experts))

    try:
        expected = weights(config, logits, {routing.EXCLUDED: jnp.asarray(gone)[None, None]})[..., kept]
        same = np.allclose(weights(fewer, logits[..., kept], {}), expected, atol=1e-5)
    except (TypeError, AttributeError, KeyError):  # it needs what is not here
        same = False
    if not same:
        raise ValueError(
            f"scheme={config.scheme!r} with {number} of {config.num_experts} experts does not route as if "
            "the others were taken away (experts in groups or of modalities, or with a share of tokens); it "
            "must be a scheme such as 'top_k', without groups"
        )


def least_harmful(harm: Float[np.ndarray, "L E"], count: int) -> Int[np.ndarray, "L F"]:
    """The ``count`` experts of every layer whose loss costs most, in their order."""
    return np.sort(np.argsort(-harm, axis=1, kind="stable")[:, :count], axis=1)


def at_random(layers: int, experts: int, count: int, seed: int) -> Int[np.ndarray, "L F"]:
    """Some experts of every layer, in their order."""
    random = np.random.default_rng(seed)
    return np.stack([np.sort(random.permutation(experts)[:count]) for _ in range(layers)])


def choosing(kept: Int[np.ndarray, "L F"], experts: int) -> Float[np.ndarray, "L F E"]:
    """The mixing by which those that are kept stay as they are."""
    return (kept[..., None] == np.arange(experts)).astype(np.float64)


def merging(
    kept: Int[np.ndarray, "L F"], load: Float[np.ndarray, "L E"], routers: Float[np.ndarray, "L D E"]
) -> Float[np.ndarray, "L F E"]:
    """The mixing by which each of the others joins the kept one whose column of the router is most alike."""
    mixing = choosing(kept, load.shape[1])
    columns = routers / np.maximum(np.linalg.norm(routers, axis=1, keepdims=True), 1e-20)
    for layer, own in enumerate(kept):
        for other in np.setdiff1d(np.arange(load.shape[1]), own):
            nearest = np.argmax(columns[layer][:, own].T @ columns[layer][:, other])
            mixing[layer, nearest, other] = 1.0
    used = mixing * load[:, None]
    unused = used.sum(axis=-1, keepdims=True) == 0  # of such a group the first one stays as it is
    used = np.where(unused, choosing(kept, load.shape[1]), used)
    return used / used.sum(axis=-1, keepdims=True)


def mix(leaves: Leaves, mixing: Float[np.ndarray, "L F E"], kept: Int[np.ndarray, "L F"]) -> Leaves:
    """The leaves of layers with fewer experts; those that no expert has a part of stay."""
    axes = {name: axis for name, axis in per_expert.AXES.items() if name in leaves}
    leaves = _in_one_order(leaves, mixing, kept)
    result = dict(leaves)
    for name, axis in axes.items():
        moved = np.moveaxis(leaves[name], axis, 1)
        new = np.einsum("lfe,le...->lf...", mixing, moved.astype(np.float64))
        result[name] = np.moveaxis(new, 1, axis).astype(leaves[name].dtype)
    return result


def _in_one_order(leaves: Leaves, mixing: np.ndarray, kept: np.ndarray) -> Leaves:
    """The leaves, with the hidden units of experts that are merged in the order of the one that stays."""
    result = {name: leaf.copy() if name in _UNITS else leaf for name, leaf in leaves.items()}
    for layer, group, other in zip(*np.nonzero(mixing), strict=True):
        first = kept[layer, group]
        if other == first:
            continue
        mine, theirs = (
            np.concatenate(
                [
                    np.moveaxis(leaves[name][layer, expert], axis, 0).reshape(leaves["w_out"].shape[2], -1)
                    for name, axis in _UNITS.items()
                    if name in leaves
                ],
                axis=1,
            )
            for expert in (first, other)
        )
        order = _matched(mine, theirs)
        for name, axis in _UNITS.items():
            if name in leaves:
                result[name][layer, other] = np.take(leaves[name][layer, other], order, axis=axis)
    return result


def _matched(mine: Float[np.ndarray, "H X"], theirs: Float[np.ndarray, "H X"]) -> Int[np.ndarray, " H"]:
    """For each of my units one of theirs, the most alike first."""
    size = np.linalg.norm(mine, axis=1)[:, None] * np.linalg.norm(theirs, axis=1)
    alike, order = mine @ theirs.T / np.maximum(size, 1e-20), np.full(len(mine), -1)
    taken = np.zeros(len(mine), bool)
    for pair in np.argsort(-alike, axis=None, kind="stable"):
        own, other = divmod(int(pair), len(mine))
        if order[own] < 0 and not taken[other]:
            order[own], taken[other] = other, True
    return order


def mix_state(state: Mapping[str, Any], mixing: np.ndarray, moe: MoEConfig) -> dict[str, Any]:
    """The routing state [L ...] of layers with fewer experts.

    Args:
      moe: of the layer with all of them.
    """

    def mixed(value: np.ndarray) -> np.ndarray:
        return np.einsum("lfe,l...e->l...f", mixing, value.astype(np.float64)).astype(value.dtype)

    names = {name for name, value in state.items() if value.ndim > 1 and value.shape[-1] == moe.num_experts}
    return {name: mixed(np.asarray(value)) if name in names else value for name, value in state.items()}
