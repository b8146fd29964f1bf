"""What must be the same however a layer is computed: by which kernel, on how many devices, by given routes.

    x --router, scheme, capacity--> what every token gets of each expert     compiled for every scheme
    x, assignment --experts--> y                                             compiled once for each shape

Experts see an assignment and never the scheme, so all schemes that one process checks share their programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import dispatch, noise, routing, simple
from vl_jax.moe.assignment import Assignment, RoutingStats, TokenChoice, weights_of
from vl_jax.moe.checks import decisions
from vl_jax.moe.checks.decisions import GROUPS, LENGTH, Waived
from vl_jax.moe.checks.subject import NO_SHARED, Subject, same
from vl_jax.moe.config import CapacityConfig
from vl_jax.moe.layer import ROUTER, completed, logits_of, statistics
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.varied import widths
from vl_jax.sharding import MeshConfig, constrain, make_mesh, use_mesh

KERNELS = ("reference", "blocked", "pallas", "triton")  # the last two are interpreted on a CPU
BALANCE = "balance"  # a loss that may count experts that do nothing; which one that was is not in the routes


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """What a layer does before its experts, on the host."""

    assignment: Assignment
    kept: Assignment  # what capacity leaves of it
    weights: np.ndarray  # f32[G T E] of the experts in every token, of what is kept
    losses: dict[str, np.ndarray]
    stats: RoutingStats
    gradients: Any  # of the router's parameters and of x, by a sum of the weights and the losses
    state: Any  # of the scheme, after an update


def routed(
    subject: Subject,
    config: MoEConfig,
    *,
    training: bool = True,
    routes: np.ndarray | None = None,
    balance: float = 1.0,
) -> LayerRouting:
    """Routes the subject's tokens, over the current mesh if there is one.

    Args:
      training: with noise, if the scheme draws any.
      routes: i32[G T K] that tokens are to take.
      balance: how much the balance loss counts for the gradients.
    """
    state = subject.state if routes is None else {**subject.state, routing.ROUTES: routes}
    run = _router(config, training and routing.scheme_of(config).rng)
    found = run(subject.params, state, subject.x, subject.context, np.float32(balance))
    return LayerRouting(*jax.device_get(found))


@functools.cache
def _router(config: MoEConfig, noisy: bool) -> Callable[..., tuple]:
    """Everything of a layer but its experts; under a mesh it is traced again."""

    def objective(router: Any, x: Any, state: Any, context: Any, balance: Any) -> tuple[jax.Array, tuple]:
        keys = noise.group_keys(jax.random.key(0), context) if noisy else None
        context = completed(context, x, router, config, keys=keys)
        logits = logits_of(x, router, context, config)
        assignment, losses = routing.route(logits, context, state, config)
        matrices = simple.of_matrices(config)
        own = simple.chosen_matrices(assignment, config)
        kept, dropped = dispatch.apply_capacity(own, context.valid, matrices)
        stats = statistics(logits, assignment, dropped, context=context, config=config)
        weights = weights_of(kept, context.valid, matrices.num_experts)
        total = jnp.sum(weights * decisions.random_probe(matrices))
        for name, loss in losses.items():
            total += balance * loss if name == BALANCE else loss
        return total, (assignment, kept, weights, losses, stats)

    @jax.jit
    def run(params: Any, state: Any, x: Any, context: Any, balance: Any) -> tuple:
        router = {name: params[name] for name in ROUTER if name in params}
        given = {name: value for name, value in state.items() if name == routing.ROUTES}
        own = {name: value for name, value in state.items() if name not in given}
        x, context, given = jax.tree.map(lambda a: constrain(a, "batch"), (x, context, given))
        value = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (_, found), gradients = value(router, x, own | given, context, balance)
        return *found, gradients, routing.update_state(own, found[-1], config)

    return run


def mixed(subject: Subject, assignment: Assignment, config: MoEConfig) -> tuple[Any, Any]:
    """(the experts' output, gradients of x, of the weights of an assignment and of the experts)."""
    names = [field.name for field in dataclasses.fields(ExpertWeights)]
    matrices, given = simple.of_matrices(config), subject.params
    parts = tuple(
        ExpertWeights(**{name: given[name + part] for name in names if name + part in given})
        for part in widths.names_of(matrices)
    )
    weights = parts if matrices.widths else parts[0]
    return jax.device_get(_experts(_of_experts(matrices))(subject.x, assignment, weights))


def _of_experts(config: MoEConfig) -> MoEConfig:
    """What experts see of a config: all else is as by default, so that schemes share programs."""
    if config.execution.exchange in ("all_to_all", "ragged"):  # these look at the limit, and name the scheme
        return config
    return MoEConfig(
        num_experts=config.num_experts,
        top_k=config.top_k,
        expert_dim=config.expert_dim,
        widths=config.widths,
        shared=NO_SHARED,
        activation=config.activation,
        limit=CapacityConfig(),
        execution=config.execution,
    )


@functools.cache
def _experts(config: MoEConfig) -> Callable[..., tuple]:
    """The experts' output and gradients; under a mesh it is traced again."""

    def objective(x: Any, gates: dict[str, Any], weights: Any, assignment: Any) -> tuple[jax.Array, Any]:
        y = widths.apply_experts(x, assignment.replace(**gates), weights, config)
        return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def run(x: Any, assignment: Any, weights: Any) -> tuple:
        gates = {n: v for n, v in vars(assignment).items() if jnp.issubdtype(v.dtype, jnp.floating)}
        value = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
        (_, y), gradients = value(x, gates, weights, assignment)
        return y, gradients

    return run


def kernels_agree(subject: Subject) -> None:
    """Output and gradients of every kernel are those of the plain definition."""
    _kernels_agree(subject, routed(subject, subject.config).kept)


def _kernels_agree(subject: Subject, assignment: Assignment) -> None:
    execution = subject.config.execution
    plain, *others = (
        dataclasses.replace(subject.config, execution=dataclasses.replace(execution, kernel=kernel))
        for kernel in KERNELS
    )
    expected = mixed(subject, assignment, plain)
    for config in others:
        what = f"kernel={config.execution.kernel!r} and 'reference': the"
        for name, a, b in zip(
            ("output", "gradient"), mixed(subject, assignment, config), expected, strict=True
        ):
            same(f"{what} {name}", a, b)


def capacity(subject: Subject) -> None:
    """With few slots kernels agree, and of choices by tokens no more are kept than there are slots."""
    config = _limited(subject)
    found = routed(subject, config)
    _kernels_agree(subject, found.kept)
    if isinstance(found.kept, TokenChoice):
        matrices = simple.of_matrices(config)
        used = found.kept.experts < matrices.num_experts
        slots = GROUPS * matrices.num_experts * (matrices.capacity_of(LENGTH) or 0)
        assert used.sum() <= slots, f"{used.sum()} choices have a slot, but there are {slots}"
        load = found.stats.load.sum(axis=0)[: matrices.num_experts]
        kept = load.sum() - found.stats.dropped.sum()
        assert kept == used.sum(), f"{used.sum()} choices have a slot, and {kept} are counted"


def devices_agree(subject: Subject) -> None:
    """What is decided, outputs and gradients on a mesh are those of one device, with and without capacity."""
    found = _some_mesh(subject)
    if not found:
        raise Waived("there is one device")
    (devices,) = found
    configs = [subject.config]
    try:
        configs.append(_limited(subject))
    except Waived:
        pass
    for config in configs:
        one = routed(subject, config)
        expected = mixed(subject, one.kept, config)
        with _some_mesh(subject)[devices]:
            many, outputs = routed(subject, config), mixed(subject, one.kept, config)
        for what in ("weights", "losses", "stats", "gradients", "state"):
            same(f"on {devices} devices {what}", getattr(many, what), getattr(one, what))
        same(f"on {devices} devices outputs and gradients of the experts", outputs, expected)


def takes_routes(subject: Subject) -> None:
    """Its own routes, given, change nothing; others are taken; balanced ones load all experts evenly."""
    config, valid = subject.config, subject.context.valid
    if not routing.scheme_of(config).replays:
        raise Waived("declared replays=False")
    run = functools.partial(routed, subject, config, training=False, balance=0.0)
    before = run()
    assert isinstance(before.assignment, TokenChoice), "declared replays=True, but its tokens do not choose"
    every = np.broadcast_to(np.arange(config.num_experts), (GROUPS, LENGTH, config.num_experts))
    drawn = np.random.default_rng(0).permuted(every, axis=-1)[..., : config.top_k]
    others = np.where(valid[..., None], drawn, config.num_experts).astype(np.int32)
    balanced = jax.device_get(_balanced_routes(valid, num_experts=config.num_experts, top_k=config.top_k))
    for devices, on in {1: contextlib.nullcontext(), **_some_mesh(subject)}.items():
        with on:
            again, taken, even = (run(routes=r) for r in (before.assignment.experts, others, balanced))
        what = f"on {devices} device(s), with its own routes given:"
        same(f"{what} what tokens get", again.weights, before.weights)
        same(f"{what} losses", _but_balance(again.losses), _but_balance(before.losses))
        same(f"{what} the gradient", again.gradients, before.gradients)
        found: Any = taken.assignment
        assert np.array_equal(found.experts, others), (
            "declared replays=True, but it takes other routes than are given"
        )
        load = even.stats.load.sum(axis=0)
        assert load.max() - load.min() <= 1, f"balance.forced=True: the load is {load.tolist()}"


_balanced_routes = jax.jit(routing.balanced_routes, static_argnames=("num_experts", "top_k"))


def _but_balance(losses: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in losses.items() if name != BALANCE}


def _some_mesh(subject: Subject) -> dict[int, contextlib.AbstractContextManager[None]]:
    """A mesh of several devices to run on, by their number; {} where there is one device."""
    parts = widths.parts_of(simple.of_matrices(subject.config))
    expert = math.gcd(2, subject.config.num_experts, *(part.num_experts for part in parts))
    tensor = math.gcd(2, *(part.expert_dim for part in parts))
    meshes = [(2, expert, tensor), (1, expert, tensor), (1, expert, 1), (2, 1, 1)]
    sizes = next((m for m in meshes if 1 < math.prod(m) <= jax.device_count()), None)
    if sizes is None:
        return {}
    mesh, devices = MeshConfig(sizes[0], 1, *sizes[1:]), math.prod(sizes)
    return {devices: use_mesh(make_mesh(mesh, devices=jax.devices()[:devices]))}


def _limited(subject: Subject) -> MoEConfig:
    try:
        limit = dataclasses.replace(subject.config.limit, factor=0.5)
        return dataclasses.replace(subject.config, limit=limit)
    except ValueError as error:
        raise Waived(str(error)) from None


COMPARISONS: tuple[tuple[str, Callable[[Subject], None]], ...] = (
    ("kernels agree", kernels_agree),
    ("kernels agree with few slots", capacity),
    ("one device = many", devices_agree),
    ("given routes are taken", takes_routes),
)
