"""What must hold for every routing scheme, checked on a tiny layer: for a scheme's author, and for the tests.

    for result in check("experiments/my_router.py:my_router"):
        print(result)

A scheme that fails says which property, and how; one that declares itself an exception (``causal=False``,
``equivariant=False``), or a machine with one device, has that property waived.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.batch import MODALITIES
from vl_jax.moe import decisions, properties, routing
from vl_jax.moe.assignment import Assignment, RoutingContext, TokenChoice
from vl_jax.moe.config import SharedExpertsConfig
from vl_jax.moe.decisions import GROUPS, LENGTH, Router, Waived, make_inputs
from vl_jax.moe.layer import DynamicMoE, MoEOutput
from vl_jax.moe.routing import MoEConfig
from vl_jax.runtime import errors
from vl_jax.sharding import MeshConfig, make_mesh, use_mesh

KERNELS = ("reference", "blocked", "pallas", "triton")  # the last two are interpreted on a CPU
NO_SHARED = SharedExpertsConfig(num=0)
TOLERANCE = 1e-5  # of norms, in float32: other orders of addition


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on one property of a scheme."""

    property: str
    passed: bool | None  # None: waived
    detail: str = ""

    def __str__(self) -> str:
        verdict = {True: "passed", False: "FAILED", None: "waived"}[self.passed]
        return f"{verdict}  {self.property}" + (f": {self.detail}" if self.detail else "")


@dataclasses.dataclass(frozen=True)
class Output:
    """What one run of the layer gave."""

    y: Any  # [G T D]
    assignment: Assignment
    layer: MoEOutput
    gradients: Any  # of parameters and input
    state: Any  # of the scheme, after an update


@dataclasses.dataclass(frozen=True)
class Subject:
    """A scheme in a small layer without shared experts, and inputs for it."""

    config: MoEConfig
    params: Any
    state: Any
    x: np.ndarray  # [G T D]
    context: RoutingContext

    def run(self, *, training: bool = True, config: MoEConfig | None = None, **inputs: Any) -> Output:
        """Runs the layer, forward and backward, with some inputs replaced.

        Args:
          training: with noise, if the scheme draws any.
        """
        config = config or self.config
        noisy = training and routing.scheme_of(config).rng
        x, context = inputs.get("x", self.x), inputs.get("context", self.context)
        params, state = inputs.get("params", self.params), inputs.get("state", self.state)
        return Output(*jax.device_get(_compiled(config, noisy)(params, state, x, context)))


@functools.cache
def _compiled(config: MoEConfig, noisy: bool) -> Callable[..., tuple]:
    """The layer's outputs and gradients; under a mesh it is traced again."""

    def objective(params: Any, x: Any, state: Any, context: Any) -> tuple[jax.Array, tuple]:
        rngs = {"routing": jax.random.key(0)} if noisy else None
        (y, output), kept = DynamicMoE(config).apply(  # pyright: ignore[reportGeneralTypeIssues]
            {"params": params}, x, context, state, rngs=rngs, mutable=["intermediates"]
        )
        total = jnp.sum(jnp.sin(y)) + sum(output.losses.values())
        return total, (y, kept["intermediates"]["assignment"][0], output)

    @jax.jit
    def run(params: Any, state: Any, x: Any, context: Any) -> tuple:
        value = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (_, (y, assignment, output)), gradients = value(params, x, state, context)
        own = {name: value for name, value in state.items() if name != routing.ROUTES}
        return y, assignment, output, gradients, routing.update_state(own, output.stats, config)

    return run


def small_config(scheme: str) -> MoEConfig:
    """Eight experts, two of them chosen, or one where the scheme insists.

    Raises:
      ValueError: there is no such scheme, or it takes neither; one line.
    """
    try:
        return MoEConfig(scheme, num_experts=8, top_k=2, expert_dim=4, shared=NO_SHARED)
    except ValueError:
        return MoEConfig(scheme, num_experts=8, top_k=1, expert_dim=4, shared=NO_SHARED)


def make_subject(config: MoEConfig) -> Subject:
    """A layer with random parameters, its initial state, and inputs for it."""
    random, (x, context), state = np.random.default_rng(0), make_inputs(0), routing.init_state(config)
    layer = DynamicMoE(config)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, context, state)["params"]
    params = jax.tree.map(lambda p: 0.5 * random.standard_normal(p.shape, np.float32), nn.meta.unbox(shapes))
    return Subject(config, params, state, x, context)


Verify = Callable[[Subject], None]


def check(
    scheme: str,
    config: MoEConfig | None = None,
    *,
    properties: Iterable[tuple[str, Verify]] | None = None,
) -> list[Result]:
    """Checks a scheme; every property gives one result.

    Args:
      scheme: as ``MoEConfig.scheme``: a built-in name, or ``path/to/file.py:name``.
      config: the layer it is tried in, small by default. Its shared experts are left out.
      properties: some of ``PROPERTIES``, which share one compiled layer, and of ``COMPARISONS``, which
        compile it anew for every kernel and for several devices; all of them by default.

    Raises:
      ValueError: the scheme cannot be loaded or configured; one line.
    """
    config = dataclasses.replace(config or small_config(scheme), scheme=scheme, shared=NO_SHARED)
    subjects: list[Subject] = []
    first = _verdict("it runs", lambda: subjects.append(make_subject(config)))
    if not subjects:
        return [first]
    properties = (*PROPERTIES, *COMPARISONS) if properties is None else properties
    return [first, *(_verdict(name, functools.partial(verify, *subjects)) for name, verify in properties)]


def _verdict(name: str, verify: Callable[[], None]) -> Result:
    try:
        verify()
    except Waived as reason:
        return Result(name, None, str(reason))
    except Exception as error:  # whatever a scheme does wrong is a finding
        kind = "" if isinstance(error, (AssertionError, ValueError)) else f"{type(error).__name__}: "
        place = errors.place_of(error)  # in the file of the scheme
        where = f"{errors.shown(place[0])}:{place[1]}: " if place else ""
        return Result(name, False, where + kind + " ".join(str(error).split()))
    return Result(name, True)


def well_formed(subject: Subject) -> None:
    """Ids are in range and differ, weights finite and not negative, and unused or masked ones zero."""
    output, c = subject.run(), subject.config
    decisions.sound(output.assignment, output.layer.losses, subject.context.valid, c)


def state_keeps_shape(subject: Subject) -> None:
    """``update_state`` gives a finite state of the same names, shapes and dtypes."""
    after = subject.run().state
    shapes = [jax.tree.map(lambda a: (a.shape, str(a.dtype)), s) for s in (subject.state, after)]
    assert shapes[0] == shapes[1], f"the state was {shapes[0]}, after an update it is {shapes[1]}"
    _finite("the state after an update", after)


def finite_gradients(subject: Subject) -> None:
    """Gradients are finite, also with large inputs and from the other end of the range."""
    for factor in (1.0, 1e4, 0.0):
        output = subject.run(x=np.float32(factor) * subject.x)
        _finite(f"a gradient with the input times {factor:g}", output.gradients)


def equivariance(subject: Subject) -> None:
    """Permuting the tokens of a group permutes their outputs (without noise)."""
    if not routing.scheme_of(subject.config).equivariant:
        raise Waived("declared equivariant=False")
    order = np.random.default_rng(0).permutation(LENGTH)
    before = subject.run(training=False)
    after = subject.run(
        training=False,
        x=subject.x[:, order],
        context=jax.tree.map(lambda a: a[:, order], subject.context),
    )
    _same("the output", after.y, before.y[:, order])
    _same("the load", after.layer.stats.load, before.layer.stats.load)


def padding_changes_nothing(subject: Subject) -> None:
    """What stands on padding reaches no output, loss, statistic or gradient of a parameter."""
    valid, (x, other) = subject.context.valid, make_inputs(1)
    mixed = jax.tree.map(lambda a, b: np.where(valid, a, b), subject.context, other)
    before = subject.run()
    x = np.where(valid[..., None], subject.x, 5 * x)
    after = subject.run(x=x, context=dataclasses.replace(mixed, valid=valid))
    assert not before.y[~valid].any(), "padding has an output"
    pairs = {
        "the output": (after.y, before.y),
        "losses or statistics": (after.layer, before.layer),
        "the gradient": (after.gradients[0], before.gradients[0]),
    }
    for what, (a, b) in pairs.items():
        _same(f"{what} depends on padding:", a, b)


def only_padding(subject: Subject) -> None:
    """A batch of nothing but padding gives zeros, and finite losses, statistics and gradients."""
    context = dataclasses.replace(subject.context, valid=np.zeros_like(subject.context.valid))
    output = subject.run(context=context)
    assert not output.y.any(), "the output is not zero"
    _finite("a loss, statistic or gradient", (output.layer, output.gradients))
    _finite("the state after an update", output.state)


def causality(subject: Subject) -> None:
    """Later tokens change nothing if the scheme is causal, and something if it says it is not."""
    scheme, cut = routing.scheme_of(subject.config), LENGTH // 2
    later = np.arange(LENGTH) >= cut
    before, changed = subject.run(), False
    for seed in range(1, 4):
        x, other = make_inputs(seed)
        x, context = np.where(later[:, None], 3 * x, subject.x), subject.context
        if not scheme.rng:  # noise follows token ids
            context = dataclasses.replace(context, tokens=np.where(later, other.tokens, context.tokens))
        if seed == 3 and not scheme.rng:  # that there are any must not matter either
            context = dataclasses.replace(context, valid=context.valid & ~later)
        after = subject.run(x=x, context=context)
        if scheme.causal:
            _same("declared causal, but later tokens matter: the output", after.y[:, :cut], before.y[:, :cut])
        changed = changed or _distance(after.y[:, :cut], before.y[:, :cut]) > TOLERANCE
    assert scheme.causal or changed, "declared causal=False, but no later token matters"


def statistics_add_up(subject: Subject) -> None:
    """The statistics of the batch are the sums of those of its halves, and count every valid token."""
    context, first = subject.context, (np.arange(GROUPS) < GROUPS // 2)[:, None]
    halves = [
        subject.run(context=dataclasses.replace(context, valid=context.valid & rows)).layer.stats
        for rows in (first, ~first)
    ]
    whole = subject.run().layer.stats
    _same("statistics of two halves", jax.tree.map(np.add, *halves), whole)
    assert whole.tokens.sum() == subject.context.valid.sum(), "tokens are miscounted"
    assert whole.load.shape == (len(MODALITIES), subject.config.num_experts)


def takes_routes(subject: Subject) -> None:
    """Its own routes, given, change nothing; others are taken; balanced ones load all experts evenly."""
    if not routing.scheme_of(subject.config).replays:
        raise Waived("declared replays=False")
    # A balance loss may count experts that do nothing, and which one that was is not in the routes.
    balance, valid = dataclasses.replace(subject.config.balance, weight=0.0), subject.context.valid[..., None]
    config = dataclasses.replace(subject.config, balance=balance)
    forced = dataclasses.replace(config, balance=dataclasses.replace(balance, forced=True))
    run = functools.partial(subject.run, training=False)
    before = run(config=config)
    assert isinstance(before.assignment, TokenChoice), "declared replays=True, but its tokens do not choose"
    every = np.broadcast_to(np.arange(config.num_experts), (GROUPS, LENGTH, config.num_experts))
    drawn = np.random.default_rng(0).permuted(every, axis=-1)[..., : config.top_k]
    others = np.where(valid, drawn, config.num_experts).astype(np.int32)
    for devices, on in {1: contextlib.nullcontext(), **_some_mesh(subject)}.items():
        with on:
            again, taken = (
                run(config=config, state={**subject.state, routing.ROUTES: routes})
                for routes in (before.assignment.experts, others)
            )
            even = run(config=forced)
        what = f"on {devices} device(s), with its own routes given:"
        _same(f"{what} the output", again.y, before.y)
        _same(f"{what} the gradient", again.gradients, before.gradients)
        found: Any = taken.assignment
        assert np.array_equal(found.experts, others), (
            "declared replays=True, but it takes other routes than are given"
        )
        load = even.layer.stats.load.sum(axis=0)
        assert load.max() - load.min() <= 1, f"balance.forced=True: the load is {load.tolist()}"


def kernels_agree(subject: Subject, config: MoEConfig | None = None) -> None:
    """Output and gradients of every kernel are those of the plain definition."""
    config = config or subject.config
    by_kernel = {kernel: dataclasses.replace(config.execution, kernel=kernel) for kernel in KERNELS}
    plain, *others = (
        (kernel, subject.run(config=dataclasses.replace(config, execution=execution)))
        for kernel, execution in by_kernel.items()
    )
    for kernel, found in others:
        for what, a, b in (
            ("output", found.y, plain[1].y),
            ("gradient", found.gradients, plain[1].gradients),
        ):
            _same(f"kernel={kernel!r} and 'reference': the {what}", a, b)


def capacity(subject: Subject) -> None:
    """With few slots kernels agree, and of choices by tokens no more are kept than there are slots."""
    config = _limited(subject)
    kernels_agree(subject, config)
    output = subject.run(config=config)
    kept = output.layer.stats.load.sum() - output.layer.stats.dropped.sum()
    slots = GROUPS * config.num_experts * (config.capacity_of(LENGTH) or 0)
    if isinstance(output.assignment, TokenChoice):
        assert kept <= slots, f"{kept} choices have a slot, but there are {slots}"


def devices_agree(subject: Subject) -> None:
    """Output, gradients and statistics on a mesh are those of one device, with and without capacity."""
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
        one = subject.run(config=config)
        with _some_mesh(subject)[devices]:
            many = subject.run(config=config)
        for what in ("y", "gradients", "layer"):
            _same(f"on {devices} devices {what}", getattr(many, what), getattr(one, what))


def _some_mesh(subject: Subject) -> dict[int, contextlib.AbstractContextManager[None]]:
    """A mesh of several devices to run on, by their number; {} where there is one device."""
    expert, tensor = math.gcd(2, subject.config.num_experts), math.gcd(2, subject.config.expert_dim)
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


def _finite(what: str, tree: Any) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)), f"{what} is not finite"


def _distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-2))


def _same(what: str, actual: Any, expected: Any) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        distance = _distance(a, b)
        name = jax.tree_util.keystr(path)
        assert distance <= TOLERANCE, f"{what}{' ' * bool(name)}{name} differs by {distance:.1e} of its norm"


def _of_router(verify: Callable[[Router], None]) -> Verify:
    return lambda subject: verify(Router(subject.config, subject.state))


PROPERTIES: tuple[tuple[str, Verify], ...] = (
    ("ids in range, weights finite, padding unused", well_formed),
    ("state keeps its shapes", state_keeps_shape),
    ("gradients are finite", finite_gradients),
    ("permuted tokens, permuted outputs", equivariance),
    ("padding changes nothing", padding_changes_nothing),
    ("nothing but padding is zero", only_padding),
    ("causal as declared", causality),
    ("statistics of parts add up", statistics_add_up),
    *((name, _of_router(verify)) for name, verify in properties.PROPERTIES),
)
COMPARISONS: tuple[tuple[str, Verify], ...] = (
    ("kernels agree", kernels_agree),
    ("kernels agree with few slots", capacity),
    ("one device = many", devices_agree),
    ("given routes are taken", takes_routes),
)
