"""A moving average of what trains, kept beside it: another model of the same run, often a better one.

    averaging(step, decay, trainable)    the step, after which the average has moved towards what trains
    averaged(state, decay)               the state with the average in the place of what trains

It begins anew with each stage and has no memory of how the stage began: after n steps the weight of step k is
proportional to decay ** (n - k), as ``optax.ema`` has it. It is kept in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.train.step import Metrics, Step, TrainState, split_trained


def init(trained: Any) -> Any:
    """The average before the first step: of nothing."""
    return _transformation(0.0).init(trained)


def averaging(step: Step, decay: float, trainable: set[str]) -> Step:
    """The step that moves ``averages`` of the state too; what the step leaves as it is counts as well."""

    def with_average(state: TrainState, batch: Batch, learning_rate: Any) -> tuple[TrainState, Metrics]:
        after, metrics = step(state, batch, learning_rate)
        trained, _ = split_trained(after.params, after.adapters, trainable)
        trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies with Python numbers and counts
            _, averages = _transformation(decay).update(trained, state.averages)
        return dataclasses.replace(after, averages=averages), metrics

    return with_average


def averaged(state: TrainState, decay: float) -> TrainState:
    """The state with the average in the place of what trains; that of no step is what there is.

    Raises:
      ValueError: the state has no average.
    """
    if not jax.tree.leaves(state.averages):
        raise ValueError(
            "there is no average of the parameters: config.stages.NAME.optimizer.average of this stage is 0"
        )
    paths = params_lib.flatten(state.averages.ema).keys()

    def of(tree: Any) -> Any:
        trained, rest = params_lib.split(tree, paths & params_lib.flatten(tree).keys())
        return params_lib.merge(_averaged(trained, state.averages, jnp.float32(decay)), rest)

    return dataclasses.replace(state, params=of(state.params), adapters=of(state.adapters), averages={})


@jax.jit
def _averaged(trained: Any, averages: optax.EmaState, decay: jax.Array) -> Any:
    """The means of some leaves that train, in their dtypes."""
    kept, count = params_lib.flatten(averages.ema), jnp.asarray(averages.count)
    weight = 1 - decay ** count.astype(jnp.float32)

    def mean(path: str, x: jax.Array) -> jax.Array:
        return jnp.where(count > 0, (kept[path] / weight).astype(x.dtype), x)

    return params_lib.map_paths(mean, trained)


def _transformation(decay: float) -> optax.GradientTransformation:
    return optax.ema(decay, debias=False, accumulator_dtype=jnp.float32)
