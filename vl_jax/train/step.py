"""The training step: a pure function ``(state, batch, learning rate) -> (state, metrics)``.

Loss and statistics are sums over rows divided by totals of the *whole* batch, so that the result is the same
with or without accumulation, rematerialisation and sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.typing import ArrayLike

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.model import VisionLanguage, update_routing_state
from vl_jax.moe import balance
from vl_jax.moe.routing import EXCLUDED, ROUTES, State, scheme_of
from vl_jax.train import lora

Leaf = Any
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything an optimiser step changes."""

    step: Leaf  # i32[] within the stage
    params: Leaf  # all parameters, trained or frozen
    optimizer: Leaf  # optimiser state of the trained leaves
    routing: State  # state of the routing scheme, stacked over sparse layers
    adapters: Leaf = struct.field(default_factory=dict)  # see ``lora``; empty without any
    load: Leaf | None = None  # f32[L E] ``balance.running_load`` of the stage; None: not kept


def split_trained(params: Any, adapters: Any, trainable: set[str]) -> tuple[Any, Any]:
    """(what the optimiser sees: trained parameters and adapters, in one tree; the frozen parameters)."""
    trained, frozen = params_lib.split(params, trainable)
    return params_lib.merge(trained, adapters), frozen


def join_trained(trained: Any, frozen: Any, trainable: set[str]) -> tuple[Any, Any]:
    """The inverse of ``split_trained``: parameters and adapters."""
    parameters, adapters = params_lib.split(trained, trainable)
    return params_lib.merge(parameters, frozen), adapters


def loss_sums(
    params: Any,
    routing: State,
    batch: Batch,
    *,
    model: VisionLanguage,
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
    """(sum of cross-entropy, (sum of hits, sum of auxiliary losses over layers, routing statistics))."""
    output: Any = model.apply({"params": params}, batch, routing, rngs=rngs)
    predicting = jnp.take_along_axis(output.hidden, batch.target_index[..., None], axis=1)
    sums: Any = model.apply(
        {"params": params}, predicting, batch.targets, batch.loss_weights, method="cross_entropy"
    )
    routed = output.routed
    auxiliary = jnp.zeros(())
    if routed is not None:
        auxiliary = sum((jnp.sum(v) for v in routed.losses.values()), auxiliary)
    stats = None if routed is None else routed.stats
    return sums[0], (sums[1], auxiliary, stats)


def split_rows(batch: Any, parts: int) -> Any:
    """Micro-batches on a new leading axis; part i takes rows i, i + parts, ...: no row changes device."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def given_rows(state: State, rows: int) -> State:
    """What an intervention gives for every row of a batch, [L B ...], with rows first: [B L ...]."""
    given = {name: state[name] for name in (EXCLUDED, ROUTES) if name in state}
    return {name: jnp.moveaxis(x, 1, 0) for name, x in given.items() if x.shape[1] == rows}


def gradients(
    state: TrainState,
    batch: Batch,
    *,
    model: VisionLanguage,
    trainable: set[str],
    accumulation: int,
    lora_scale: float = 1.0,
) -> tuple[Any, Metrics, Any]:
    """Gradients of parameters that train and of adapters for the whole batch, metrics, routing statistics."""
    trained, frozen = split_trained(state.params, state.adapters, trainable)
    total = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
    rngs = None
    if scheme_of(model.config.moe).rng:
        rngs = {"routing": jax.random.fold_in(jax.random.key(0), state.step)}

    def objective(trained: Any, part: tuple[Batch, State]) -> tuple[jax.Array, tuple]:
        rows, given = part
        params = lora.merge(*join_trained(trained, frozen, trainable), lora_scale)
        routing = state.routing | {name: jnp.moveaxis(x, 0, 1) for name, x in given.items()}
        nll, (hits, auxiliary, stats) = loss_sums(params, routing, rows, model=model, rngs=rngs)
        return nll / total + auxiliary / accumulation, (
            nll / total,
            hits / total,
            auxiliary / accumulation,
            stats,
        )

    def one_part(carry: Any, part: tuple[Batch, State]) -> tuple[Any, None]:
        (_, parts), grads = jax.value_and_grad(objective, has_aux=True)(trained, part)
        return jax.tree.map(jnp.add, carry, (grads, parts)), None

    if accumulation == 1:
        (_, parts), grads = jax.value_and_grad(objective, has_aux=True)(trained, (batch, {}))
    else:
        given = given_rows(state.routing, batch.tokens.shape[0])
        micro = split_rows((batch, given), accumulation)
        shapes = jax.eval_shape(
            lambda part: jax.value_and_grad(objective, has_aux=True)(trained, part),
            jax.tree.map(lambda x: x[0], micro),
        )
        (_, parts), grads = shapes
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, parts))
        (grads, parts), _ = jax.lax.scan(one_part, zeros, micro)
    loss, accuracy, auxiliary, stats = parts
    return grads, {"loss": loss, "accuracy": accuracy, "auxiliary_loss": auxiliary}, stats


def make_train_step(
    model: VisionLanguage,
    optimizer: optax.GradientTransformation,
    *,
    trainable: set[str],
    accumulation: int = 1,
    lora_scale: float = 1.0,
) -> Callable[[TrainState, Batch, ArrayLike], tuple[TrainState, Metrics]]:
    """The step of one stage, ``(state, batch, learning_rate)``, to be compiled by the caller.

    Args:
      trainable: the parameters that train; adapters of the state train besides.
      lora_scale: what adapters are multiplied by when they are merged.
    """

    def step(state: TrainState, batch: Batch, learning_rate: ArrayLike) -> tuple[TrainState, Metrics]:
        grads, metrics, stats = gradients(
            state, batch, model=model, trainable=trainable, accumulation=accumulation, lora_scale=lora_scale
        )
        trained, frozen = split_trained(state.params, state.adapters, trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts with decay rates
            updates, optimizer_state = optimizer.update(grads, state.optimizer, trained)
        updates = jax.tree.map(lambda u: (learning_rate * u).astype(u.dtype), updates)
        trained = optax.apply_updates(trained, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        routing, load = state.routing, state.load
        if stats is not None:
            metrics |= balance.summarize(stats)
            if load is not None:
                load = balance.running_load(load, stats)
                metrics["routing/maxvio_running"] = balance.max_violation(load)
            routing = update_routing_state(routing, stats, model.config)
        params, adapters = join_trained(trained, frozen, trainable)
        return TrainState(state.step + 1, params, optimizer_state, routing, adapters, load), metrics

    return step
