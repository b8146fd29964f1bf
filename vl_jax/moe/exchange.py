"""Expert parallelism: bringing tokens to the shards that hold their experts.

    x [B/(data fsdp expert) ...] --all-gather over "expert"--> tokens of the whole expert group
        --this shard's experts, its slice of F--> partial sums
        --reduce-scatter over "expert", reduce over "tensor"--> the tokens it began with

Inside ``shard_map`` the collectives are ours, never the partitioner's guess. The all-gather form moves N - 1
copies of the tokens over N shards, less than an all-to-all for N below about 6 at k = 6. ``ring`` moves the
same, in steps that hide behind the work of experts. Above, every token may be sent only where it is wanted:
``all_to_all`` for a layer with a capacity, ``ragged`` for any.

A device's experts have room for a little more rows than even load brings (``execution.buffer``). Where more
choices could name them, tokens go through them in windows (``bounded``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vl_jax import sharding
from vl_jax.kernels import target
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import all_to_all, dispatch, mixing
from vl_jax.moe.assignment import Assignment, Merge, Soft, TokenChoice
from vl_jax.moe.bounded import ragged, rooms
from vl_jax.moe.bounded.rooms import Traffic
from vl_jax.moe.routing import MoEConfig
from vl_jax.sharding import current_mesh, current_rules

MOST_IN_RING = 8  # shards: every one is a step of the program


def apply_experts(
    x: Float[Array, "G T D"],
    assignment: Assignment,
    weights: ExpertWeights,
    config: MoEConfig,
) -> Float[Array, "G T D"]:
    """The routed experts over the current mesh, or on one device if there is none.

    Raises:
      ValueError: experts, expert width or groups do not divide by their mesh axes, or the exchange is not
        for this kind of assignment.
    """
    mesh, activation = current_mesh(), config.activation
    how, kernel = config.execution.exchange, config.execution.kernel
    if mesh is None:
        return _apply(x, assignment, weights, config)
    rules, slots = current_rules(), config.capacity_of(x.shape[1])
    batch = rules.spec(("batch",))
    _check(x, weights.w_in, dict(mesh.shape), rules.batch)
    shards = mesh.shape["expert"]
    _check_exchange(assignment, config, shards)

    sides = sharding.divisible(P(*rules.spec(("embed",))), (x.shape[-1],), mesh)[0]

    def local(x: jax.Array, assignment: Assignment, weights: ExpertWeights) -> jax.Array:
        weights = _whole(weights, sides)
        if weights.b_out is not None:  # added once, not by every shard of the hidden units
            first = jax.lax.axis_index("tensor") == 0
            weights = dataclasses.replace(weights, b_out=jnp.where(first, weights.b_out, 0))
        if isinstance(assignment, TokenChoice) and how in ("all_to_all", "ragged"):
            if how == "ragged":
                own = target.choose(kernel, x.shape[-1], weights.w_out.shape[1])
                traffic = traffic_of(config, *assignment.experts.shape, shards=shards)
                send: Any = functools.partial(ragged.apply_experts, traffic=traffic, kernel=own)
            else:
                assert slots is not None  # the config sees to that
                own = all_to_all.PLAIN if kernel == "auto" else kernel
                send = functools.partial(all_to_all.apply_experts, slots=slots, kernel=own)
            out = send(x, assignment, weights, activation=activation)
            return jax.lax.psum(out.astype(jnp.float32), "tensor").astype(x.dtype)
        apply = functools.partial(_apply, weights=weights, config=config)
        if how == "ring" and not isinstance(assignment, Merge):
            out = _ring(x, assignment, apply, weights.w_in.shape[0])
            return jax.lax.psum(out, "tensor").astype(x.dtype)
        everywhere = jax.tree.map(_gather, assignment)
        mine = dispatch.own_experts(everywhere, weights.w_in.shape[0], jax.lax.axis_index("expert"))
        if isinstance(mine, Merge):  # experts move, tokens stay
            merged = jax.tree.map(_scatter, mixing.merge_weights(mine, weights))
            merged = jax.tree.map(lambda w: w.astype(x.dtype), merged)
            out = mixing.apply_merged(x, merged, activation=activation)
            return jax.lax.psum(out.astype(jnp.float32), "tensor").astype(x.dtype)
        out = apply(_gather(x), mine)
        out = jax.lax.psum(out.astype(jnp.float32), "tensor")
        return _scatter(out).astype(x.dtype)

    specs = ExpertWeights(
        w_in=P("expert", sides, None, "tensor"),
        w_out=P("expert", "tensor", sides),
        b_in=None if weights.b_in is None else P("expert", None, "tensor"),
        b_out=None if weights.b_out is None else P("expert", None),
    )
    return jax.shard_map(local, mesh=mesh, in_specs=(batch, batch, specs), out_specs=batch, check_vma=False)(
        x, assignment, weights
    )


def _whole(weights: ExpertWeights, sides: str | tuple[str, ...] | None) -> ExpertWeights:
    """Weights gathered along the width of tokens; so their gradients are scattered to where they live."""
    if sides is None:
        return weights
    gather = functools.partial(jax.lax.all_gather, axis_name=sides, tiled=True)
    return dataclasses.replace(
        weights, w_in=gather(weights.w_in, axis=1), w_out=gather(weights.w_out, axis=2)
    )


def traffic_of(config: MoEConfig, groups: int, length: int, choices: int, *, shards: int) -> Traffic:
    """What a device's tokens ask of ``ragged``.

    Args:
      groups: rows of the batch on this device, of ``length`` tokens with ``choices`` experts at most.
      shards: devices that the experts are cut up among.

    Raises:
      ValueError: devices do not divide by ``execution.slices``.
    """
    execution, slots = config.execution, config.capacity_of(length)
    # A group of experts is within one slice, and a token uses few of them.
    nested = config.groups.num % execution.slices == 0
    return Traffic(
        tokens=groups * length,
        top_k=config.top_k,
        num_experts=config.num_experts,
        shards=shards,
        factor=execution.buffer,
        chunks=execution.chunks,
        slices=execution.slices,
        most_choices=choices,
        most_slices=config.groups.top if nested else None,
        slots=None if slots is None else slots * groups * shards,
    )


def _apply(
    x: Float[Array, "G T D"], assignment: Assignment, weights: ExpertWeights, config: MoEConfig
) -> Float[Array, "G T D"]:
    """The routed experts on this device, whatever the kind of assignment."""
    activation, kernel = config.activation, config.execution.kernel
    if isinstance(assignment, Merge):
        merged = jax.tree.map(lambda w: w.astype(x.dtype), mixing.merge_weights(assignment, weights))
        return mixing.apply_merged(x, merged, activation=activation)
    kernel = target.choose(kernel, x.shape[-1], weights.w_out.shape[1])
    if isinstance(assignment, Soft):
        return mixing.apply_soft(x, assignment, weights, activation=activation, kernel=kernel)
    room = None
    if isinstance(assignment, TokenChoice):
        tokens, share = x.shape[0] * x.shape[1], Fraction(weights.w_in.shape[0], config.num_experts)
        factor, most = config.execution.buffer, assignment.experts.size
        room = rooms.pairs_room(tokens, config.top_k, share, factor=factor, most=most)
        room = max(room, assignment.experts.shape[-1])
    return dispatch.apply_experts(x, assignment, weights, activation=activation, kernel=kernel, room=room)


def _gather(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True)


def _scatter(x: jax.Array) -> jax.Array:
    return jax.lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True)


def _ring(
    x: Float[Array, "G T D"],
    assignment: Assignment,
    apply: Callable[[jax.Array, Assignment], jax.Array],
    num_local: int,
) -> Float[Array, "G T D"]:
    """Every shard's tokens go round and its sums follow one step behind, so that both end where they began.

    While experts work on one shard's tokens, the next ones arrive: nothing in a step waits for its transfers.
    The result is float32, as sums are on their way.
    """
    shards, me = jax.lax.axis_size("expert"), jax.lax.axis_index("expert")
    neighbours = [(i, (i + 1) % shards) for i in range(shards)]

    def shift(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.ppermute(a, "expert", neighbours), tree)

    def part(x: jax.Array, assignment: Assignment) -> jax.Array:
        return apply(x, dispatch.own_experts(assignment, num_local, me)).astype(jnp.float32)

    visitors: Any = shift((x, assignment)) if shards > 1 else None
    sums = None
    total = part(x, assignment)
    for step in range(1, shards):
        following = shift(visitors) if step + 1 < shards else None
        parts = part(*visitors)
        sums = parts if sums is None else shift(sums) + parts
        visitors = following
    return total if sums is None else total + shift(sums)


def _check_exchange(assignment: Assignment, config: MoEConfig, shards: int) -> None:
    how = config.execution.exchange
    if how in ("all_to_all", "ragged") and not isinstance(assignment, TokenChoice):
        raise ValueError(
            f"execution.exchange={how!r} is for tokens that choose; scheme={config.scheme!r} gives "
            f"{type(assignment).__name__}"
        )
    if shards % config.execution.slices:
        raise ValueError(
            f"execution.slices={config.execution.slices} does not divide mesh axis expert={shards}"
        )
    if how == "ring" and shards > MOST_IN_RING:
        raise ValueError(
            f"execution.exchange='ring' is for up to {MOST_IN_RING} shards, mesh axis expert={shards}"
        )


def _check(x: jax.Array, w_in: jax.Array, sizes: dict[str, int], batch_axes: tuple[str, ...]) -> None:
    groups = 1
    for axis in batch_axes:
        groups *= sizes[axis]
    for what, size, axes, shards in (
        ("batch rows", x.shape[0], "*".join(batch_axes), groups),
        ("num_experts", w_in.shape[0], "expert", sizes["expert"]),
        ("expert_dim", w_in.shape[3], "tensor", sizes["tensor"]),
    ):
        if size % shards:
            raise ValueError(f"{what}={size} does not divide by mesh axes {axes}={shards}")
