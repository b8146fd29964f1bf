"""The training step: a pure function ``(state, batch, learning rate) -> (state, metrics)``.

Loss and statistics are sums over rows divided by totals of the *whole* batch, so that the result is the same
with or without accumulation, rematerialisation and sharding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.typing import ArrayLike

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.compress import quantize
from vl_jax.fusion import budget, weights
from vl_jax.moe import stacks
from vl_jax.moe.routing import scheme_of
from vl_jax.moe.stacks import RoutingState, Stacks
from vl_jax.nn.low_rank import EVERYWHERE, Only
from vl_jax.nn.still import resting
from vl_jax.params import Leaf
from vl_jax.roles import Role
from vl_jax.train import lora
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.objectives.objective import Objective, Sums
from vl_jax.train.objectives.rows import give, given_rows, split_rows
from vl_jax.train.specialise import chosen as experts
from vl_jax.train.updates import fusing
from vl_jax.train.updates.groups import by_group, value_and_grads

Metrics = dict[str, jax.Array | np.ndarray | np.number | np.bool_]  # by name; some may be on the host already
NEXT_TOKEN = NextToken()
NO_ROLES: Mapping[str, Role] = {}
NO_MASKS: experts.Masks = {}
GRADIENT_NORMS = "gradient_norms"  # among the metrics: f32[N], see ``gradient_norms``


@struct.dataclass
class TrainState:
    """Everything an optimiser step changes."""

    step: Leaf  # i32[] within the stage
    params: Leaf  # all parameters, trained or frozen; some may be in int8, see ``compress.quantize``
    optimizer: Leaf  # optimiser state of the trained leaves
    routing: dict[str, Any]  # state of the routing schemes, by stack; a ``RoutingState``
    adapters: Leaf = struct.field(default_factory=dict)  # see ``lora``; empty without any
    collections: dict[str, Any] = struct.field(default_factory=dict)  # batch statistics and the like, by name
    load: dict[str, Leaf] = struct.field(default_factory=dict)  # f32[L E] running load of the stage, by stack
    fusing: dict[str, Leaf] = struct.field(default_factory=dict)  # what gradient fusion remembers, if it does
    averages: Leaf = struct.field(default_factory=dict)  # of what trains, if kept; see ``updates.average``


Step = Callable[[TrainState, Batch, ArrayLike], tuple[TrainState, Metrics]]


@runtime_checkable
class StepWrapper(Protocol):
    """Makes another step of a step, such as one that trains on mixed rows; it becomes one program with it.

    A wrapper is a frozen dataclass, hence a value in an experiment file; it stands in a file of one's own.
    """

    def __call__(self, step: Step) -> Step:
        """The step that takes the place of ``step``, and may call it; both are pure functions."""
        ...


def split_trained(params: Any, adapters: Any, trainable: set[str]) -> tuple[Any, Any]:
    """(what the optimiser sees: trained parameters and adapters, in one tree; the frozen parameters)."""
    trained, frozen = params_lib.split(params, trainable)
    return params_lib.merge(trained, adapters), frozen


def join_trained(trained: Any, frozen: Any, trainable: set[str]) -> tuple[Any, Any]:
    """The inverse of ``split_trained``: parameters and adapters."""
    parameters, adapters = params_lib.split(trained, trainable)
    return params_lib.merge(parameters, frozen), adapters


def gradients(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    trainable: set[str],
    accumulation: int,
    lora_scale: float = 1.0,
    lora_only: Only = EVERYWHERE,
    objective: Objective = NEXT_TOKEN,
    roles: Mapping[str, Role] = NO_ROLES,
    seed: ArrayLike = 0,
    stacked: Collection[str] = (),
    grouped: bool = False,
) -> tuple[Any, Metrics, Sums]:
    """Gradients of parameters that train and of adapters for the whole batch; metrics; the sums.

    A collection moves once a step: by the mean of what each micro-batch would change. What belongs to a
    module whose own parameters do not train stays as it is.

    Args:
      seed: of the noise of routing.
      stacked: the parameters whose first axis counts layers.
      grouped: gives a gradient for each group of the losses, by its name.
    """
    trained, frozen = split_trained(state.params, state.adapters, trainable)
    state = dataclasses.replace(state, collections=_at_rest(state, trainable))
    totals = objective.total(batch)
    rngs = _streams(model, seed, state.step)

    def minimised(trained: Any, part: tuple[Batch, RoutingState]) -> tuple[Any, Sums]:
        rows, given = part
        joined = join_trained(trained, frozen, trainable)
        params = lora.pack(*joined, lora_scale, roles, lora_only, stacked)
        routing = give(state.routing, given)
        found = objective(params, dataclasses.replace(state, routing=routing), rows, model=model, rngs=rngs)
        losses = {name: value / total_of(name, totals) for name, value in found.losses.items()}
        metrics = {name: value / total_of(name, totals) for name, value in found.metrics.items()}
        # What is a mean over the rows of a part has to become one over all.
        auxiliary = found.auxiliary / accumulation
        collections = found.collections
        if accumulation > 1:  # changes are added up, so that what does not change keeps its bits
            before = {name: state.collections[name] for name in collections}
            collections = jax.tree.map(lambda x, y: (x - y) / accumulation, collections, before)
        parts = Sums(losses, metrics, auxiliary, found.stats, collections, found.gates)
        if grouped:
            return by_group(losses, auxiliary, objective), parts
        return weighted(losses, objective) + auxiliary, parts

    def differentiated(part: tuple[Batch, RoutingState]) -> tuple[tuple[Any, Sums], Any]:
        if grouped:
            return value_and_grads(minimised, trained, part)
        return jax.value_and_grad(minimised, has_aux=True)(trained, part)

    def one_part(carry: Any, part: tuple[Batch, RoutingState]) -> tuple[Any, None]:
        (_, parts), grads = differentiated(part)
        return jax.tree.map(jnp.add, carry, (grads, parts)), None

    if accumulation == 1:
        (_, parts), grads = differentiated((batch, {}))
    else:
        given = given_rows(state.routing, batch.tokens.shape[0])
        micro = split_rows((batch, given), accumulation)
        (_, parts), grads = jax.eval_shape(differentiated, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, parts))
        (grads, parts), _ = jax.lax.scan(one_part, zeros, micro)
        before = {name: state.collections[name] for name in parts.collections}
        moved = jax.tree.map(jnp.add, before, parts.collections)
        parts = dataclasses.replace(parts, collections=moved)
    metrics = {**parts.losses, **parts.metrics, "loss": weighted(parts.losses, objective)}
    return grads, {**metrics, "auxiliary_loss": parts.auxiliary}, parts


def _streams(model: Any, seed: ArrayLike, step: Leaf) -> dict[str, jax.Array] | None:
    """The random streams of a step, by name; None where a model needs none.

    A gate with a budget draws nothing: that its stream is there tells it that it is to learn.
    """
    names = []
    if any(scheme_of(stack.moe).rng for stack in model.config.stacks.values()):
        names.append("routing")
    if getattr(model.config, "budget", None) is not None:
        names.append(budget.LEARNING)
    names += getattr(model.config, "draws", ())
    return {name: jax.random.fold_in(jax.random.key(seed), step) for name in names} or None


def _at_rest(state: TrainState, trainable: set[str]) -> dict[str, Any]:
    """The collections; what belongs to a module with parameters of which none trains is marked to stay."""

    def of(paths: Iterable[str]) -> set[str]:
        return {path.rpartition("/")[0] for path in paths}

    if not state.collections:
        return state.collections
    weights = params_lib.flatten(state.params).keys() | quantize.paths_of(state.params)
    resting_modules = of(weights) - of(trainable)
    return resting(state.collections, lambda path: path.rpartition("/")[0] in resting_modules)


def total_of(name: str, totals: Mapping[str, jax.Array]) -> jax.Array:
    """The total of a loss or metric: by its name, or by what stands before its last slash."""
    return totals[name] if name in totals else totals[name.rpartition("/")[0]]


def weighted(losses: dict[str, jax.Array], objective: Objective) -> jax.Array:
    """The sum of the losses, each times its weight."""
    terms = (value * objective.weights[name] for name, value in losses.items())
    return functools.reduce(jnp.add, terms)


def _one_gradient(
    grads: Any,
    masks: experts.Masks,
    way: fusing.GradientFusion | None,
    state: TrainState,
    *,
    objective: Objective,
    metrics: Metrics,
    seed: ArrayLike,
) -> fusing.Fused:
    """What ``gradients`` gave, cut by the masks, as one gradient."""
    if way is None:
        return fusing.Fused(experts.cut(grads, masks, 0.0), None, state.fusing, {})
    grads = {name: experts.cut(of, masks, 0.0) for name, of in grads.items()}
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    return fusing.fuse(way, grads, state.fusing, objective=objective, metrics=metrics, key=key)


def gradient_norms(grads: Any, stacked: Collection[str]) -> jax.Array:
    """The norm of each leaf, in the order of their paths, of stacked leaves one for each layer: f32[N]."""
    norms = []
    for path, leaf in sorted(params_lib.flatten(grads).items()):
        axes = tuple(range(1, leaf.ndim)) if path in stacked else None
        norms.append(jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)).reshape(-1))
    return jnp.concatenate(norms)


def gradient_names(trained: Any, stacked: Collection[str]) -> list[str]:
    """What the figures of ``gradient_norms`` are of, from the leaves that train or their shapes."""
    names = []
    for path, leaf in sorted(params_lib.flatten(trained).items()):
        names += [f"{path}[{layer}]" for layer in range(leaf.shape[0])] if path in stacked else [path]
    return names


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    trainable: set[str],
    accumulation: int = 1,
    lora_scale: float = 1.0,
    lora_only: Only = EVERYWHERE,
    objective: Objective = NEXT_TOKEN,
    roles: Mapping[str, Role] = NO_ROLES,
    seed: ArrayLike = 0,
    stacked: Collection[str] = (),
    held: Collection[str] = (),
    chosen: tuple[int, ...] = (),
    masks: experts.Masks = NO_MASKS,
    way: fusing.GradientFusion | None = None,
) -> Step:
    """The step of one stage, ``(state, batch, learning_rate)``, to be compiled by the caller.

    Args:
      trainable: the parameters that train; adapters of the state train besides.
      lora_scale: what adapters are multiplied by when they are merged.
      lora_only: the layers and experts that have adapters.
      roles: of the parameters that have adapters, by path.
      objective: what the stage minimises.
      seed: of the noise of routing.
      stacked: the parameters and adapters whose first axis counts layers.
      held: top-level modules whose routing state stays as it is.
      chosen: the experts that train, with their ``masks``; empty: all.
      way: how the gradients of groups of losses become one; None: they are added up.

    Raises:
      ValueError: rows of the objective act on one another, and micro-batches would part them.
    """
    if objective.couples_rows and accumulation > 1:
        raise ValueError(
            f"accumulation={accumulation}: rows act on one another under {type(objective).__name__}, so the "
            "batch cannot be cut; set accumulation=1"
        )

    def step(state: TrainState, batch: Batch, learning_rate: ArrayLike) -> tuple[TrainState, Metrics]:
        grads, metrics, sums = gradients(
            state,
            batch,
            model=model,
            trainable=trainable,
            accumulation=accumulation,
            lora_scale=lora_scale,
            lora_only=lora_only,
            objective=objective,
            roles=roles,
            seed=seed,
            stacked=stacked,
            grouped=way is not None,
        )
        fused = _one_gradient(grads, masks, way, state, objective=objective, metrics=metrics, seed=seed)
        grads, metrics = fused.gradient, metrics | fused.figures
        extra = {"plain": fused.plain} if way is not None and way.at == "update" else {}
        trained, frozen = split_trained(state.params, state.adapters, trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts with decay rates
            updates, optimizer_state = optimizer.update(grads, state.optimizer, trained, **extra)
        updates = jax.tree.map(lambda u: (learning_rate * u).astype(u.dtype), updates)
        # Adding minus zero leaves every number as it is, a negative zero too.
        trained = optax.apply_updates(trained, experts.cut(updates, masks, -0.0))
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics[GRADIENT_NORMS] = gradient_norms(grads, stacked)
        parts: Stacks = model.config.stacks  # pyright: ignore[reportAttributeAccessIssue]
        load = stacks.update_load(state.load, sums.stats)
        metrics |= stacks.summarize(sums.stats, load, parts, state.routing)
        metrics |= budget.summarize(sums.gates.get("budget", {}))
        metrics |= weights.summarize(sums.gates.get("weights", {}))
        routing = stacks.update_state(state.routing, sums.stats, parts)
        routing = experts.kept_state(routing, state.routing, chosen, parts)
        routing |= {name: state.routing[name] for name in routing if parts[name].runs[0][0] in held}
        params, adapters = join_trained(trained, frozen, trainable)
        collections = state.collections | sums.collections
        moved = (params, optimizer_state, routing, adapters, collections, load, fused.state)
        return TrainState(state.step + 1, *moved), metrics

    return step
